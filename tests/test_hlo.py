import jax
import jax.numpy as jnp
import pytest

from janus_jax import hlo

# What the parts look like in programs for TPUs, shortened; layouts and attributes are as XLA writes them.
TPU = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (input: f32[32,64]) -> f32[8,64] {
  %input = f32[32,64]{1,0:T(8,128)S(1)} parameter(0)
  %whole = f32[32,64]{1,0:T(8,128)} all-reduce(%input), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %mine = f32[8,64]{1,0:T(8,128)} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={8,64}
}

%begin (p: bf16[1,8]) -> (bf16[1,8], bf16[1,64]) {
  %p = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  %gathered.1 = bf16[1,64]{1,0} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={1}, frontend_attributes={chain_id="3"}
  ROOT %custom = (bf16[1,8]{1,0}, /*index=1*/bf16[1,64]{1,0}) custom-call(%gathered.1), custom_call_target="AsyncCollectiveStart"
}

%middle (p: bf16[1,8]) -> bf16[1,64] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %gathered.2 = bf16[1,64]{1,0} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={1}, frontend_attributes={chain_id="3"}
}

%condition (state: (s32[], f32[6,32,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %state = (s32[]{:T(128)}, f32[6,32,64]{2,1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%open (state: (s32[], f32[6,32,64])) -> pred[] {
  %state = (s32[], f32[6,32,64]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%counter, %counter), direction=LT
}

%body (state: (s32[], f32[6,32,64])) -> (s32[], f32[6,32,64]) {
  %state = (s32[], f32[6,32,64]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %stack = f32[6,32,64]{2,1,0} get-tuple-element(%state), index=1
  %layer = f32[32,64]{1,0} fusion(%stack, %counter), kind=kLoop, calls=%pick
  %scattered = f32[8,64]{1,0} fusion(%layer), kind=kCustom, calls=%all-reduce-scatter
  %start = (bf16[1,8]{1,0}, bf16[1,64]{1,0}) fusion(%scattered), kind=kCustom, calls=%begin
  %go = bf16[1,64]{1,0} fusion(%scattered), kind=kCustom, calls=%middle
  ROOT %next = (s32[], f32[6,32,64]{2,1,0}) tuple(%counter, %stack)
}

%pick (stack: f32[6,32,64], at: s32[]) -> f32[32,64] {
  %stack = f32[6,32,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,32,64]{2,1,0} dynamic-slice(%stack, %at, %zero, %zero), dynamic_slice_sizes={1,32,64}
  ROOT %flat = f32[32,64]{1,0} bitcast(%one)
}

%chunks (state: (s32[], f32[6,32,64])) -> (s32[], f32[6,32,64]) {
  %state = (s32[], f32[6,32,64]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %stack = f32[6,32,64]{2,1,0} get-tuple-element(%state), index=1
  %norm = f32[1,128]{1,0} all-reduce(%counter), channel_id=4, replica_groups={}, to_apply=%add
  ROOT %next = (s32[], f32[6,32,64]{2,1,0}) tuple(%counter, %stack)
}

ENTRY %main (a: s32[], b: f32[6,32,64]) -> f32[6,32,64] {
  %a = s32[] parameter(0)
  %b = f32[6,32,64]{2,1,0} parameter(1)
  %state = (s32[], f32[6,32,64]{2,1,0}) tuple(%a, %b)
  %layers = (s32[], f32[6,32,64]{2,1,0}) while(%state), condition=%condition, body=%body, metadata={op_name="jit(step)/decoder/while"}
  %loss = (s32[], f32[6,32,64]{2,1,0}) while(%layers), condition=%open, body=%chunks, metadata={op_name="jit(step)/jvp(loss_masked)/while"}
  %token = token[] after-all()
  %shard = f32[16,8]{1,0} constant({...})
  %send = (f32[16,8]{1,0}, u32[], token[]) send(%shard, %token), channel_id=10, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[6,32,64]{2,1,0} get-tuple-element(%loss), index=1
}
"""  # noqa: E501


# What the parts look like in programs for GPUs.
GPU = """\
HloModule jit_decode, is_scheduled=true

%open (state: (s32[], f32[4])) -> pred[] {
  %state = (s32[], f32[4]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %still = pred[] fusion(%counter), kind=kLoop, calls=%less
}

%narrow (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %once = f32[4]{0} fusion(%x), kind=kLoop, calls=%twice
}

%wide (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %one = f32[4]{0} fusion(%x), kind=kLoop, calls=%twice
  ROOT %two = f32[4]{0} fusion(%one), kind=kLoop, calls=%twice
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %x = f32[4]{0} get-tuple-element(%state), index=1
  %product = (f32[4]{0}, s8[33554432]{0}) custom-call(%x, %x), custom_call_target="__cublas$lt$matmul"
  %y = f32[4]{0} get-tuple-element(%product), index=0
  %read = f32[4]{0} conditional(%counter, %y, %y), branch_computations={%narrow, %wide}
  ROOT %next = (s32[], f32[4]{0}) tuple(%counter, %read)
}

%layer (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %x = f32[4]{0} get-tuple-element(%state), index=1
  %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%twice
  ROOT %next = (s32[], f32[4]{0}) tuple(%counter, %y)
}

ENTRY %main (a: s32[], b: f32[4]) -> f32[4] {
  %a = s32[] parameter(0)
  %b = f32[4]{0} parameter(1)
  %copied = f32[4]{0} copy(%b)
  %state = (s32[], f32[4]{0}) tuple(%a, %copied)
  %layers = (s32[], f32[4]{0}) while(%state), condition=%open, body=%layer, backend_config={"known_trip_count":{"n":"6"}}
  %steps = (s32[], f32[4]{0}) while(%layers), condition=%open, body=%body, metadata={op_name="jit(decode)/while"}
  ROOT %out = f32[4]{0} get-tuple-element(%steps), index=1
}
"""  # noqa: E501


def test_what_the_host_of_a_gpu_has_to_do():
    module = hlo.parse(GPU)
    # A copy; six layers, whose count is known beforehand; four steps of a product and the dearer branch, and
    # five looks at the condition, each of them a kernel.
    found = hlo.launches(module, hlo.Counts({"decode": 4}))
    assert found == hlo.Launches(kernels=1 + 6 * 1 + 4 * (1 + 2) + 5, waits=4 * 1 + 5)
    more = hlo.launches(module, hlo.Counts({"decode": 4}), more=1)
    assert more == hlo.Launches(found.kernels + 1 + (1 + 2) + 1, found.waits + 1 + 1)
    counts = hlo.Counts()
    assert hlo.launches(module, counts).waits == 1 + 2
    assert counts.unknown == {"jit(decode)/while"}


def test_scratch_memory_of_a_product_is_no_traffic():
    steps = [hlo.memory_bytes(hlo.parse(GPU), hlo.Counts({"decode": n})) for n in (1, 2)]
    # A step reads two operands and writes one, and (both branches count) runs three fusions.
    assert steps[1] - steps[0] == 3 * 16 + 3 * 32


def test_parsing():
    module = hlo.parse(TPU)
    assert module.entry == "main"
    body = {i.name: i for i in module.computations["body"]}
    assert body["layer"].opcode == "fusion"
    assert body["layer"].operands == ("stack", "counter")
    assert body["layer"].called("calls") == ("pick",)
    assert body["start"].shapes == (hlo.Shape("bf16", (1, 8)), hlo.Shape("bf16", (1, 64)))
    (scratch,) = (i for i in module.computations["all-reduce-scatter"] if i.name == "input")
    assert scratch.shapes == (hlo.Shape("f32", (32, 64), space=1),)
    entry = {i.name: i for i in module.computations["main"]}
    assert entry["layers"].op_name == "jit(step)/decoder/while"


@pytest.mark.parametrize(("shape", "size"), [("bf16[2,3]", 12), ("pred[7]", 7), ("f32[]", 4), ("s4[8]", 4), ("f8e4m3fn[5]", 5)])  # fmt: skip # noqa: E501
def test_bytes_of_a_shape(shape, size):
    module = hlo.parse(f"ENTRY %e () -> x {{\n  ROOT %x = {shape}{{0}} parameter(0)\n}}")
    assert module.computations["e"][0].shapes[0].bytes == size


def test_what_is_no_program():
    with pytest.raises(hlo.HloError, match="no entry"):
        hlo.parse("nothing to see")


@pytest.mark.parametrize(
    ("attribute", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ()),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("[4,2]<=[2,2,2]T(2,1,0)", ((0, 4), (2, 6), (1, 5), (3, 7))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", ((3, 2), (1, 0))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
    ],
)
def test_replica_groups(attribute, groups):
    assert hlo.replica_groups(f"channel_id=1, replica_groups={attribute}, dimensions={{0}}") == groups


def test_no_groups_are_everybody_and_unknown_groups_an_error():
    assert hlo.replica_groups("channel_id=1") == ()
    with pytest.raises(hlo.HloError, match="unknown form"):
        hlo.replica_groups("replica_groups=somehow")


def test_trip_counts():
    module = hlo.parse(TPU)
    entry = {i.name: i for i in module.computations["main"]}
    assert hlo.trip_count(module, entry["layers"]) == 6
    assert hlo.trip_count(module, entry["loss"]) is None
    known = 'while(%s), condition=%open, body=%chunks, backend_config={"known_trip_count":{"n":"3"}}'
    (loop,) = hlo.parse(f"ENTRY %e () -> x {{\n  ROOT %w = (s32[]) {known}\n}}").computations["e"]
    assert hlo.trip_count(module, loop) == 3


def test_collectives_with_how_often_they_run():
    counts = hlo.Counts({"loss_masked": 40})
    found = hlo.collectives(hlo.parse(TPU), counts, devices=8, slice_of=[0] * 4 + [1] * 4)
    got = [(c.kind, c.group, c.times, c.crosses, c.transfer) for c in found]
    assert got == [
        ("reduce-scatter", 4, 6, False, False),  # a fusion of an all-reduce and a slice of it
        ("all-gather", 8, 6, True, False),  # once, though its chain has two links
        ("all-reduce", 8, 40, True, False),
        ("all-reduce", 2, 1, True, True),  # what goes through the hosts to the other slice
    ]
    assert [c.bytes for c in found] == [32 * 64 * 4 * 3 / 4, 16 * 7, 2 * 4 * 7 / 8, 16 * 8 * 4]
    assert not counts.unknown


def test_one_slice_is_never_crossed():
    found = hlo.collectives(hlo.parse(TPU.replace("%send", "%other")), hlo.Counts(), devices=8)
    assert not any(c.crosses for c in found if not c.transfer)


def test_a_loop_that_nobody_knows_counts_once_and_is_named():
    counts = hlo.Counts({"loss_tokens": 40})
    found = hlo.collectives(hlo.parse(TPU), counts, devices=8)
    assert [c.times for c in found if c.op_name == "" and c.kind == "all-reduce"] == [1, 1]
    assert counts.unknown == {"jit(step)/jvp(loss_masked)/while"}


def test_memory_traffic_counts_the_slice_and_not_the_stack():
    pick = 32 * 64 * 4
    scatter = 32 * 64 * 4 + 8 * 64 * 4
    start = 8 * 64 * 4 + (8 + 64) * 2
    go = 8 * 64 * 4 + 64 * 2
    counter = 4
    in_layers = 6 * (2 * pick + counter + scatter + start + go)
    in_loss = 10 * (4 + 128 * 4)
    assert hlo.memory_bytes(hlo.parse(TPU), hlo.Counts({"loss": 10})) == in_layers + in_loss


def test_an_update_in_place_moves_only_the_update():
    program = jax.jit(lambda x, y: jax.lax.dynamic_update_slice(x, y, (2, 0)), donate_argnums=0)
    text = program.lower(jnp.zeros((1000, 64)), jnp.ones((1, 64))).compile().as_text()
    assert hlo.memory_bytes(hlo.parse(text), hlo.Counts()) < 5 * 64 * 4


def test_counting_agrees_with_unrolling_on_this_backend():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (jax.NamedSharding(mesh, jax.P(*a)) for a in (("x",), ()))

    def collectives(unroll):
        def step(w, _):
            return w - jax.grad(lambda w: jnp.sum((jnp.ones((16, 8)) @ w) ** 2))(w), None

        def program(w, x):
            return jax.lax.scan(lambda w, x: step(w + jnp.mean(x), None), w, x, unroll=unroll)

        lowered = jax.jit(program, in_shardings=(whole, jax.NamedSharding(mesh, jax.P(None, "x")))).lower(
            jnp.zeros((8, 4)), jnp.zeros((5, 16))
        )
        found = hlo.collectives(hlo.parse(lowered.compile().as_text()), hlo.Counts(), devices=8)
        return sum(c.times for c in found), sum(c.times * c.bytes for c in found)

    assert rows.num_devices == 8
    looped, unrolled = collectives(1), collectives(5)
    assert looped[0] > 0
    assert looped[1] == unrolled[1]  # XLA may merge several into one, but not move less


def test_a_gather_of_logits_is_found_and_a_table_is_not():
    vocab_size, dim = 502, 16

    def gathered(*dims):
        shape = hlo.Shape("f32", dims)
        return hlo.Collective("all-gather", (shape,), 8, False, 1, "", (shape,))

    tables = [gathered(502, 16), gathered(251, 16), gathered(502, 2), gathered(502), gathered(48, 24, 16)]
    logits = [gathered(24, 502), gathered(48, 24, 502), gathered(24, 251), gathered(3, 8, 251)]
    assert hlo.logits_moved([*tables, *logits], vocab_size, dim) == logits
