"""`python -m janus_jax VERB` is `janus-jax VERB`."""

import sys

from janus_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
