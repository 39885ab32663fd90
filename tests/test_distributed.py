"""Training and conversion in two processes: DistributedDataParallel, FSDP2 and DTensors (gloo, on the CPU)."""

from processes import in_two_processes, python


def test_ddp_trains_the_float_layer(tmp_path):
    """In a process of its own that ends without destructors: the last owner of a gloo group joins the group's thread while it holds
    the interpreter's lock, for which that thread may be waiting."""
    script = f"""
import os, torch, torch.distributed as dist, quant_ops as qo
from torch import nn
torch.manual_seed(0)
convolution = qo.QuantConv2d.from_float(nn.Conv2d(3, 4, 3))
model = nn.Sequential(convolution, nn.Flatten(), qo.QuantLinear.from_float(nn.Linear(64, 7)), nn.Linear(7, 2))
x = torch.randn(4, 3, 6, 6)
dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=0, world_size=1)
result = nn.parallel.DistributedDataParallel(model)(x)
assert torch.equal(result, model(x))
result.square().sum().backward()
assert model[3].weight.grad.abs().sum() > 0
print([name for name, _ in model.named_parameters()], flush=True)
os._exit(0)
"""
    run = python("-c", script)
    assert run.stdout.strip() == "['3.weight', '3.bias']", run.stdout + run.stderr


def test_two_processes_train_one_model(tmp_path):
    """DistributedDataParallel: after each step both have the same parameters, those of one process with both batches."""
    in_two_processes(
        tmp_path,
        """
        def make(config):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
            qo.prepare_qat_(model, config)
            return model

        torch.manual_seed(1)
        steps = [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(5)]
        for config in (qo.Int8Static(observer="lsq", weight_bits=4), qo.Int8Static(), qo.Int8Dynamic(weight_bits=4)):
            one, two = make(config), make(config)
            if isinstance(config, qo.Int8Static):
                for model in (one, two):
                    qo.calibrate(model, [x for x, _ in steps])
            both = nn.parallel.DistributedDataParallel(two)
            half = slice(4 * rank, 4 * rank + 4)
            for model, part in ((one, slice(None)), (both, half)):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                for x, y in steps:
                    optimizer.zero_grad()
                    F.mse_loss(model(x[part]), y[part]).backward()
                    optimizer.step()
            for (name, expected), got in zip(one.named_parameters(), two.parameters()):
                others = [torch.zeros_like(got) for _ in range(2)]
                dist.all_gather(others, got.detach())
                assert torch.equal(*others), (config, name)
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=name)
            assert len(qo.convert_(two).converted) == 2
        fresh = make(qo.Int8Static(observer="lsq"))
        refused(RuntimeError, "several processes would start differently", fresh, steps[0][0])
        """,
    )


def test_two_processes_train_a_sharded_model(tmp_path):
    """FSDP2: the parameters are those of one process, and the converted model that of the gathered state."""
    in_two_processes(
        tmp_path,
        """
        def make(config):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
            qo.prepare_qat_(model, config)
            torch.manual_seed(1)
            if not isinstance(config, qo.Int8Dynamic):
                qo.calibrate(model, [torch.randn(8, 6)])
            return model.train()

        torch.manual_seed(5)
        steps = [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(4)]
        configs = [qo.Int8Static(observer="lsq"), qo.Int8Static(observer="lsq", num_steps=2, asymmetric=False)]
        for config in [*configs, qo.Int8Static(observer="mse"), qo.Int8Dynamic(weight_bits=4)]:
            one, two = make(config), make(config)
            for layer in two:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(two, mesh=mesh)
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (one, two)]
            for x, y in steps:
                for m, o in zip((one, two), optimizers):
                    o.zero_grad()
                    F.mse_loss(m(x), y).backward()
                    o.step()
            for (name, expected), (_, got) in zip(one.named_parameters(), two.named_parameters()):
                torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-4, atol=1e-6, msg=name)
            state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in two.state_dict().items()}
            whole = make(config)
            whole.load_state_dict(state)
            assert len(qo.convert_(whole).converted) == 2
            qo.convert_(one)
            torch.testing.assert_close(whole(steps[0][0]), one(steps[0][0]), rtol=1e-2, atol=1e-2)
            assert len(qo.convert_(two).converted) == 2
            for (name, expected), got in zip(whole.state_dict().items(), two.state_dict().values(), strict=True):
                assert torch.equal(got, expected), (config, name)
            for mode in (True, False):  # it still has FSDP's hooks
                assert torch.equal(two.train(mode)(steps[0][0]), whole.train(mode)(steps[0][0]))
            qo.save(two, f"{folder}/{rank}.safetensors")
        """,
    )


def test_a_sharded_float_model(tmp_path):
    """quantize_ gathers each weight; layers that would observe or train have to be made before fully_shard."""
    in_two_processes(
        tmp_path,
        """
        def make():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()

        x, reference, sharded = torch.randn(5, 6, generator=torch.Generator().manual_seed(rank)), make(), make()
        fully_shard(sharded, mesh=mesh)
        for call in (qo.prepare_, qo.prepare_qat_):
            refused(ValueError, "expected whole weights, got a sharded one (DTensor) in layer '0'", call, sharded)
            assert type(sharded[0]) is nn.Linear
        with torch.no_grad():
            torch.testing.assert_close(sharded(x), reference(x))
            for model in (reference, sharded):
                assert qo.quantize_(model, exclude=["2"]).converted == ["0", "3"]
            assert torch.equal(sharded(x), reference(x))
        for observer in ("lsq", "minmax"):  # prepared and calibrated, then made to train, then sharded
            trained = make()
            qo.prepare_(trained, qo.Int8Static(observer=observer))
            qo.calibrate(trained, [x])
            qo.prepare_qat_(trained)
            fully_shard(trained.train(), mesh=mesh)
            trained(x).sum().backward()
            assert all(torch.isfinite(full(p.grad)).all() for p in trained.parameters())
        each = make()
        fully_shard(each[0], mesh=mesh)
        result = qo.quantize_(each)
        assert result.skipped == [("0", "fully_shard was applied to the layer itself. Quantize before it")], result
        whole = make()
        qo.quantize_(whole)
        fully_shard(whole, mesh=mesh)
        assert whole(x).shape == (5, 3)
        x = torch.distributed.tensor.distribute_tensor(x, mesh, [torch.distributed.tensor.Replicate()])
        refused(TypeError, "quant_ops.QuantLinear: expected a plain tensor, got a DTensor", whole, x)
        """,
    )


def test_dtensors(tmp_path):
    """The quantize family on every sharding gives the bits of one process, and stays sharded where no slice is split."""
    in_two_processes(
        tmp_path,
        """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        def same(got, expected):
            got, expected = [[one] if isinstance(one, torch.Tensor) else one for one in (got, expected)]
            assert all(a.shape == b.shape and torch.equal(full(a), b) for a, b in zip(got, expected, strict=True))

        torch.manual_seed(0)
        for shape in ((8, 6), (7, 5), (1, 4, 6)):
            plain, grad = torch.randn(shape), torch.randn(shape)
            for placement in (*map(Shard, range(len(shape))), Replicate()):
                x, g = (distribute_tensor(t, mesh, [placement]) for t in (plain, grad))
                same(qo.quantize_rows(x, True), qo.quantize_rows(plain, True))
                for dims in ([], [-1], [0], list(range(1, len(shape)))):
                    for asymmetric in (False, True):
                        options = (-120, 127, asymmetric)
                        got, expected = (qo.choose_qparams(t, dims, *options) for t in (x, plain))
                        same(got, expected)
                        if isinstance(placement, Shard) and dims and placement.dim not in [d % len(shape) for d in dims]:
                            assert got[0].placements == (placement,)
                        same(qo.quant_tensor_forward(x, *got, *options), qo.quant_tensor_forward(plain, *expected, *options))
                        codes = [qo.quant_tensor_forward(*t, *options, False) for t in ((x, *got), (plain, *expected))]
                        same(*codes)
                        same(qo.dequant_tensor(codes[0], *got), qo.dequant_tensor(codes[1], *expected))
                        results = [qo.quant_tensor_backward(*t, *options) for t in ((g, x, *got), (grad, plain, *expected))]
                        same(*results)
                scales = [qo.choose_qparams(t, [1], -7, 7)[0].requires_grad_() for t in (x, plain)]
                leaves = [t.clone().requires_grad_() for t in (x, plain)]
                for leaf, scale in zip(leaves, scales):
                    full(qo.quant_tensor_forward(leaf, scale, None, -7, 7)).square().sum().backward()
                same(leaves[0].grad, leaves[1].grad)
                same(scales[0].grad, scales[1].grad)
        scale = torch.rand(1, 2, 2) + 0.1
        got = qo.quant_tensor_forward(x, distribute_tensor(scale, mesh, [Shard(1)]), None, -7, 7, block_size=[1, 2, 3])
        same(got, qo.quant_tensor_forward(plain, scale, None, -7, 7, block_size=[1, 2, 3]))
        mixed = (qo.quant_tensor_forward, x, scale, None, -7, 7)
        refused(TypeError, "expected all tensors to be DTensors, got plain ['scale']", *mixed)
        """,
    )


def test_dtensors_of_weight_only_operators(tmp_path):
    """Rows and indices stay where they are, and so do rows of a weight that is not packed."""
    in_two_processes(
        tmp_path,
        """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        def same(got, expected):
            assert got.shape == expected.shape and torch.equal(full(got), expected)

        torch.manual_seed(0)
        codes, scale, bias = torch.randint(-8, 8, (9, 70), dtype=torch.int8), torch.rand(9, 3), torch.randn(9)
        weight = [codes, scale, torch.randint(-8, 8, (9, 3), dtype=torch.int8)]
        packed = qo.pack_weight_only(codes, 4, 32)
        for placed in (Replicate(), Shard(0)):
            there = [distribute_tensor(t, mesh, [placed]) for t in (*weight, bias, packed)]
            multiplier = torch.rand(70)
            multiplier_there = distribute_tensor(multiplier, mesh, [placed])
            for shape in ((6,), (7, 1), (1, 3, 4)):
                x, indices = torch.randn(*shape, 70), torch.randint(9, shape)
                for placement in (*map(Shard, range(len(shape) + 1)), Replicate()):
                    at = distribute_tensor(x, mesh, [placement])
                    split = placement == Shard(len(shape))
                    for dynamic in (True, False):
                        for pack in (False, True):
                            options = [
                                {"packed_weight": p if pack else None, "dynamic": dynamic, "x_multiplier": m if pack else None}
                                for p, m in ((there[4], multiplier_there), (packed, multiplier))
                            ]
                            got = qo.weight_only_linear(at, *there[:4], 4, 32, **options[0])
                            expected = qo.weight_only_linear(x, *weight, bias, 4, 32, **options[1])
                            where = Replicate() if split else placement
                            if where == Replicate() and placed == Shard(0) and not pack:
                                where = Shard(len(shape))
                            assert got.placements == (where,)
                            if dynamic:
                                same(got, expected)
                            else:
                                torch.testing.assert_close(full(got), expected)
                    if split:
                        continue
                    at = distribute_tensor(indices, mesh, [placement])
                    for p, plain in ((None, None), (there[4], packed)):
                        got = qo.weight_only_embedding(at, *there[:3], 4, 32, packed_weight=p)
                        assert got.placements == (placement,)
                        same(got, qo.weight_only_embedding(indices, *weight, 4, 32, packed_weight=plain))
        mixed = (qo.weight_only_linear, there[0].float(), codes, scale)
        refused(TypeError, "expected all tensors to be DTensors, got plain ['weight', 'weight_scale']", *mixed)
        """,
    )


def test_dtensors_of_integer_products(tmp_path):
    """On every sharding of x and the weight the bits are those of one process. int32 sums of parts of K are partial."""
    in_two_processes(
        tmp_path,
        """
        import itertools
        from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

        def at(tensor, placement):
            return None if tensor is None else distribute_tensor(tensor, mesh, [placement])

        whole = lambda tensor: at(tensor, Replicate())

        def check(op, x, weight, rows, *columns, packed=None, channel=-1, **options):
            expected = op(x, weight, *columns, **options)
            for px, pw in itertools.product((*map(Shard, range(x.dim())), Replicate()), (Shard(0), Shard(1), Replicate())):
                tensors = {k: whole(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
                for pack in (None, packed) if packed is not None else (None,):
                    if pack is not None:
                        tensors["packed_weight"] = whole(pack)
                    got = op(at(x, px), at(weight, pw), *map(whole, columns), **tensors)
                    assert got.shape == expected.shape and got.dtype == expected.dtype
                    assert torch.equal(full(got), expected), (op, px, pw)
                    adds = expected.dtype == torch.int32 and options.get("x_scale", x) is not None
                    grouped = options.get("groups", 1) > 1
                    where = Replicate()
                    if isinstance(px, Shard) and px.dim in rows:
                        where = px
                    elif pw == Shard(0) and pack is None and not grouped:
                        where = Shard(expected.dim() + channel)
                    elif adds and px == Shard(x.dim() + channel) and pw == Shard(1) and pack is None and not grouped:
                        where = Partial()
                    assert got.placements == (where,), (op, px, pw, got.placements, where)

        torch.manual_seed(0)
        weight, scale, bias = torch.randint(-127, 128, (9, 31), dtype=torch.int8), torch.rand(9), torch.randn(9)
        check(qo.int8_gemm, torch.randint(-128, 128, (5, 31), dtype=torch.int8), weight, [0])
        packed = qo.pack_weight(weight)
        for shape in ((31,), (4, 3, 31)):
            x, rows = torch.randn(shape), range(len(shape) - 1)
            row = torch.rand(*shape[:-1], 1) + 0.01
            check(qo.int8_linear, x, weight, rows, scale, bias, packed=packed, asymmetric=True, relu=True)
            added = {"residual": torch.randn(*shape[:-1], 9), "activation": "gelu"}
            check(qo.int8_linear, x, weight, rows, scale, bias, **added)
            check(qo.int8_linear, x, weight, rows, scale, bias, x_scale=row, x_zero_point=torch.full(row.shape, 3))
            check(qo.int8_linear, x, weight, rows, scale[:1], x_scale=row, out_dtype=torch.int32, x_multiplier=torch.rand(31))
        image, kernel = torch.randn(3, 4, 6, 7), torch.randint(-127, 128, (6, 4, 3, 3), dtype=torch.int8)
        for x in (image, image[0], image.contiguous(memory_format=torch.channels_last)):
            rows, given = range(x.dim() - 3), {"channel": -3, "stride": 2, "padding": (1, 2)}
            check(qo.int8_conv2d, x, kernel, rows, scale[:6], bias[:6], packed=qo.pack_weight(kernel), asymmetric=True, **given)
            check(qo.int8_conv2d, x, kernel, rows, scale[:6], x_scale=torch.tensor(0.02), out_dtype=torch.int32, **given)
            check(qo.int8_conv2d, x, kernel[:, :2].contiguous(), rows, scale[:6], bias[:6], groups=2, **given)

        for placement in (Shard(0), Shard(1), Replicate()):
            assert torch.equal(full(qo.pack_weight(at(weight, placement))), packed)
            assert torch.equal(full(qo.unpack_weight(at(packed, Replicate()), weight.shape)), weight)
            by_group = qo.pack_weight_only(weight // 16, 4, 32)
            assert torch.equal(full(qo.pack_weight_only(at(weight // 16, placement), 4, 32)), by_group)
            assert torch.equal(full(qo.unpack_weight_only(at(by_group, Shard(0)), weight.shape, 4, 32)), weight // 16)
            x = torch.randn(4, 6)
            plain = qo.choose_qparams_affine(x, qo.MappingType.ASYMMETRIC, [1, 3], torch.int8)
            got = qo.choose_qparams_affine(at(x, placement), qo.MappingType.ASYMMETRIC, [1, 3], torch.int8)
            assert all(map(torch.equal, map(full, got), plain))
            codes = qo.quantize_affine(at(x, placement), [1, 3], *got, torch.int8)
            assert torch.equal(full(codes), qo.quantize_affine(x, [1, 3], *plain, torch.int8))
            back = qo.dequantize_affine(codes, [1, 3], *got, torch.int8)
            assert torch.equal(full(back), qo.dequantize_affine(full(codes), [1, 3], *plain, torch.int8))
        mixed = (qo.int8_linear, at(x, Shard(0)), weight[:, :6], scale)
        refused(TypeError, "expected all tensors to be DTensors, got plain ['weight', 'weight_scale']", *mixed)
        """,
    )


def test_dtensors_of_codes(tmp_path):
    """What lies between products is computed where samples, channels or elements lie; what is concatenated is gathered."""
    in_two_processes(
        tmp_path,
        """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        torch.manual_seed(0)
        s, z = torch.tensor(0.02), torch.tensor(3)
        at = lambda t, placement: distribute_tensor(t, mesh, [placement])
        S, Z = at(s, Replicate()), at(z, Replicate())
        calls = {
            "elements": (4, lambda x, s, z: qo.requantize(x, s, z, out_scale=s, activation="relu")),
            "sum": (4, lambda x, s, z: qo.int8_add(x, x, s, s, z, out_scale=s)),
            "product": (4, lambda x, s, z: qo.int8_mul(x, x, s, s, z, out_scale=s)),
            "channels": (4, lambda x, s, z: qo.int8_mul(x, qo.int8_adaptive_avg_pool2d(x, s, z, 1, out_scale=s), s, s)),
            "max": (2, lambda x, s, z: qo.int8_max_pool2d(x, 3, 2, 1, ceil_mode=True)),
            "average": (2, lambda x, s, z: qo.int8_avg_pool2d(x, s, z, 2, 1)),
            "adaptive": (2, lambda x, s, z: qo.int8_adaptive_avg_pool2d(x, s, z, (2, 3), out_scale=s)),
            "upsample": (2, lambda x, s, z: qo.int8_upsample_nearest2d(x, (2, 1))),
        }
        x = torch.randint(-128, 128, (3, 5, 6, 7), dtype=torch.int8)
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            for placement in (*map(Shard, range(4)), Replicate()):
                there = at(image, placement)
                for name, (dims, call) in calls.items():
                    got = call(there, S, Z)
                    kept = placement if isinstance(placement, Shard) and placement.dim < dims else Replicate()
                    assert got.placements == (kept,), (name, placement, got.placements)
                    assert torch.equal(full(got), call(image, s, z)), (name, placement)
                got = qo.int8_cat([there, there], [S, S], [Z, Z], out_scale=S)
                assert torch.equal(full(got), qo.int8_cat([image, image], [s, s], [z, z], out_scale=s))
        """,
    )


def test_dtensors_of_floating_formats(tmp_path):
    """As test_dtensors. What rounds stochastically is gathered, with one seed for all processes."""
    in_two_processes(
        tmp_path,
        """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        def same(got, expected):
            assert got.shape == expected.shape and torch.equal(full(got), expected)

        torch.manual_seed(0)
        for shape in ((8, 6), (7, 5), (1, 4, 6), (1, 1)):
            plain, grad = torch.randn(shape) * 3, torch.randn(shape)
            scales = [torch.rand(()) + 0.1, torch.rand(shape[-1:]) + 0.1, torch.rand(*shape[:-1], 1) + 0.1]
            for placement in (*map(Shard, range(len(shape))), Replicate()):
                x, g = (distribute_tensor(t, mesh, [placement]) for t in (plain, grad))
                for scale in (None, *scales):
                    other = scale if scale is None else distribute_tensor(scale, mesh, [Replicate()])
                    got = qo.quant_float_forward(x, 4, 3, other, special="nan")
                    same(got, qo.quant_float_forward(plain, 4, 3, scale, special="nan"))
                    assert got.placements == (placement,)
                    same(qo.quant_float_backward(g, x, 2, 1, other), qo.quant_float_backward(grad, plain, 2, 1, scale))
                tensor_scale = torch.full((1,) * len(shape), 0.01)
                for dim in range(-len(shape), len(shape)):
                    scale = distribute_tensor(tensor_scale, mesh, [Replicate()])
                    got = qo.quant_block_forward(x, dim, 4, 2, 1, scale, scale_rule="e4m3")
                    same(got, qo.quant_block_forward(plain, dim, 4, 2, 1, tensor_scale, scale_rule="e4m3"))
                    split = isinstance(placement, Shard) and placement.dim == dim % len(shape)
                    assert got.placements == ((Replicate(),) if split else (placement,))
                    same(qo.quant_block_backward(g, x, dim, 3, 2, 1), qo.quant_block_backward(grad, plain, dim, 3, 2, 1))
                    same(
                        qo.quant_block_forward(x, dim, 3, 2, 1, rounding="stochastic", seed=4),
                        qo.quant_block_forward(plain, dim, 3, 2, 1, rounding="stochastic", seed=4),
                    )
                leaves = [t.clone().requires_grad_() for t in (x, plain)]
                for leaf in leaves:
                    full(qo.quant_float_forward(leaf, 2, 1)).square().sum().backward()
                same(leaves[0].grad, leaves[1].grad)
                same(qo.E4M3(x), qo.E4M3(plain))
                for seed in (7, torch.tensor([7])):
                    got = qo.quant_float_forward(x, 2, 1, rounding="stochastic", seed=seed)
                    same(got, qo.quant_float_forward(plain, 2, 1, rounding="stochastic", seed=7))
                one = distribute_tensor(torch.tensor(7), mesh, [Replicate()])
                same(qo.quant_float_forward(x, 2, 1, rounding="stochastic", seed=one), full(got))
        scale = torch.rand(2, 3) + 0.1
        x = distribute_tensor(plain := torch.randn(4, 6), mesh, [Shard(0)])
        got = qo.quant_float_forward(x, 2, 1, distribute_tensor(scale, mesh, [Shard(1)]), block_size=[2, 2])
        same(got, qo.quant_float_forward(plain, 2, 1, scale, block_size=[2, 2]))
        mixed = (qo.quant_float_forward, x, 2, 1, scale)
        refused(TypeError, "expected all tensors to be DTensors, got plain ['scale']", *mixed)
        refused(ValueError, "dim in [-2, 1], got 2", qo.quant_block_forward, x, 2, 4, 2, 1)

        torch.manual_seed(rank)  # processes that draw different seeds get the first one's
        drawn = full(qo.quant_float_forward(x, 2, 1, rounding="stochastic"))
        both = [torch.zeros_like(drawn) for _ in range(2)]
        dist.all_gather(both, drawn)
        assert torch.equal(*both)
        torch.manual_seed(0)
        assert torch.equal(drawn, qo.quant_float_forward(plain, 2, 1, rounding="stochastic"))
        """,
    )


def test_training_with_tensor_parallel_weights(tmp_path):
    in_two_processes(
        tmp_path,
        """
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        def make():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
            qo.prepare_qat_(model, qo.Int8Dynamic(weight_bits=4))
            return model

        one, two = make(), make()
        parallelize_module(two, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        for model in (one, two):
            model(x).square().sum().backward()
        torch.testing.assert_close(two(x), one(x))
        for expected, got in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(full(got.grad), expected.grad)
        """,
    )
