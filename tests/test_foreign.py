"""Stand-ins for the names that Mambas written for CUDA import, each against a slow float64 formula."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evm_deploy
from evm_deploy.errors import EvmError, UsageError
from evm_deploy.model.foreign import mamba1, norms, orders, own_loops, ssd, stand_ins
from evm_deploy.model.foreign.running import foreign_code
from evm_deploy.model.foreign.scan import scan


def slow(u, delta, A, B, C, D=None, bias=None, softplus=True):
    """The recurrence in float64, channels first, B and C (b, G, N, L) -> y, states (b, D, N, L)."""
    u, delta, A, B, C = (x.double() for x in (u, delta, A, B, C))
    delta = delta if bias is None else delta + bias.double()[:, None]
    dt = F.softplus(delta) if softplus else delta
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))
    h, states = torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64), []
    for t in range(u.shape[2]):
        h = torch.exp(dt[..., t, None] * A) * h + (dt[..., t] * u[..., t])[..., None] * B[..., t]
        states.append(h)
    states = torch.stack(states, -1)
    y = (states * C).sum(2)
    return y if D is None else y + D.double()[:, None] * u, states


def case(N=4, G=2, D=6, L=9, b=2, seed=0):
    torch.manual_seed(seed)
    A = -torch.rand(D, N) * 4 - 0.1
    return torch.randn(b, D, L), torch.randn(b, D, L), A, torch.randn(b, G, N, L), torch.randn(b, G, N, L)


def close(have, want):
    assert have.shape == want.shape
    assert (have - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("N", [1, 4, 16])
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("softplus", [True, False])
def test_a_call_with_and_without_its_options(N, G, softplus):
    u, delta, A, B, C = case(N, G)
    delta = delta if softplus else delta.abs() * 0.01
    D, bias, z = torch.randn(6), torch.rand(6), torch.randn(2, 6, 9)
    close(scan(u, delta, A, B, C, delta_softplus=softplus), slow(u, delta, A, B, C, softplus=softplus)[0])
    want = slow(u, delta, A, B, C, D, bias, softplus)[0]
    close(scan(u, delta, A, B, C, D, None, bias, softplus), want)
    close(scan(u, delta, A, B, C, D, z, bias, softplus), want * F.silu(z.double()))
    if G == 1:
        close(scan(u, delta, A, B[:, 0], C[:, 0], D, None, bias, softplus), want)


def test_groups_of_b_and_c_may_differ():
    u, delta, A, B, C = case(G=2)
    close(scan(u, delta, A, B[:, :1], C, delta_softplus=True), slow(u, delta, A, B[:, :1], C)[0])


def test_the_compiled_entry_points():
    u, delta, A, B, C = case()
    D, bias, z = torch.randn(6), torch.rand(6), torch.randn(2, 6, 9)
    want, states = slow(u, delta, A, B, C, D, bias)
    y, kept, gated = mamba1.mamba_fwd(u, delta, A, B, C, D, z, bias, True)
    close(y, want)
    close(gated, want * F.silu(z.double()))
    assert kept.isnan().all()
    assert len(mamba1.mamba_fwd(u, delta, A, B, C, D, None, bias, True)) == 2
    close(mamba1.core_fwd(u, delta, A, B, C, D, bias, True, 1, True)[0], want)
    close(mamba1.states_fwd(u, delta, A, B, D, bias, True, 1, True)[0], states)
    u, delta, A, B, C = case(N=1)
    want = slow(u, delta, A, B, C, D, bias)[0]
    close(mamba1.core_fwd(u, delta, A[:, 0], B[:, :, 0], C[:, :, 0], D, bias, True, 1)[0], want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, d, A, B, C: scan(u, d, A.to(torch.complex64), B, C), "A is complex"),
        (lambda u, d, A, B, C: scan(u, d, A, B[0, 0], C), "B of shape .* does not depend on the input"),
        (lambda *x: mamba1.selective_scan_fn(*x, return_last_state=True), "return_last_state has no stand-in"),
        (lambda u, *_: mamba1.causal_conv1d_fn(u, u[0, :, :4], seq_idx=1), "seq_idx has no stand-in"),
        (lambda u, *_: mamba1.causal_conv1d_fn(u, u[0, :, :4], activation="relu"), "activation='relu' has no stand-in"),
        (lambda *_: mamba1.Mamba(16, bimamba_type="v3"), "bimamba_type='v3' has no stand-in"),
    ],
)
def test_what_has_no_stand_in_is_refused_by_name(call, message):
    with pytest.raises(UsageError, match=message):
        call(*case())


def test_the_inner_function_takes_every_argument_by_position():
    """checkpoint_lvl and the weights of norms stand behind delta_softplus."""
    torch.manual_seed(0)
    xz, x_proj, dt_proj = torch.randn(1, 8, 5), torch.randn(2 + 6, 4), torch.randn(4, 2)
    inner = (xz, torch.randn(4, 3), None, x_proj, dt_proj)
    out, A, D, bias = torch.randn(6, 4), -torch.rand(4, 3), torch.randn(4), torch.randn(4)
    y = mamba1.mamba_inner_fn_no_out_proj(*inner, A, None, None, D, bias, None, None, True)
    rest = (None, None, D, bias, None, None, True, 1, None, None, None, 1e-6)
    close(mamba1.mamba_inner_fn(*inner, out, None, A, *rest), y.transpose(1, 2) @ out.T)
    with pytest.raises(UsageError, match="c_rms_weight has no stand-in"):
        mamba1.mamba_inner_fn(*inner, out, None, A, *rest[:8], None, torch.ones(3))


def test_convolutions_of_every_release():
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
    padded = F.pad(x.double(), (3, 0))
    want = sum(padded[..., i : i + 9] * weight[:, i, None] for i in range(4)) + bias[:, None]
    close(mamba1.causal_conv1d_fn(x, weight, bias), want)
    close(mamba1.causal_conv1d_fn(x, weight, bias, activation="swish"), F.silu(want))
    assert mamba1.causal_conv1d_fn(x.half(), weight, bias).dtype == torch.float16  # a bias in another dtype
    close(mamba1.causal_conv1d_fwd(x, weight, bias, True), F.silu(want))
    close(mamba1.causal_conv1d_fwd(x, weight, bias, None, True), F.silu(want))
    close(mamba1.causal_conv1d_fwd(x, weight, bias, None, None, None, False), want)
    out = torch.empty_like(x)
    assert mamba1.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True) is None
    close(out, F.silu(want))


def test_norms():
    x, residual, weight = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(16)
    total = (x + residual).double()
    want = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight
    y, kept = norms.rms_norm_fn(x, weight, None, residual, eps=1e-5, prenorm=True)
    close(y, want)
    close(kept, total)
    close(norms.layer_norm_fn(x, weight, weight, eps=1e-5), F.layer_norm(x, (16,), weight, weight, 1e-5))
    z, groups = torch.randn(2, 5, 16), (x.double()).unflatten(-1, (4, 4))
    want = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight * F.silu(z.double())
    close(norms.gated_rms_norm(x, weight, None, z, 1e-5, group_size=4), want)
    with pytest.raises(UsageError, match="rowscale"):
        norms.layer_norm_fn(x, weight, None, rowscale=weight)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_windows_there_and_back(flip, flat):
    x = torch.arange(2 * 3 * 5 * 7.0).reshape(2, 3, 5, 7)
    given, size = (x.flatten(2), (5, 7)) if flat else (x, ())
    y = orders.local_scan(given, 2, flip, *size)
    first = y.flatten(2).flip(-1)[0, 0, :4] if flip else y.flatten(2)[0, 0, :4]
    assert first.tolist() == [0, 1, 7, 8]
    back = orders.local_reverse(y, 2, flip, 5, 7)
    assert torch.equal(back, given)


# ------------------------------------------------------------------------------------------------------------ Mamba-2


def slow_ssd(x, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=True, limit=None):
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    dt = dt if dt_bias is None else dt + dt_bias.double()
    dt = F.softplus(dt) if softplus else dt
    dt = dt.clamp(*limit) if limit else dt
    h, ys = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[-1]), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    y = y if D is None else y + D.double().reshape(heads, -1) * x
    return y if z is None else y * F.silu(z.double()), h


@pytest.mark.parametrize(
    ("b", "L", "H", "P", "G", "N"),
    [(2, 196, 4, 16, 1, 32), (1, 50, 6, 8, 2, 16), (1, 64, 2, 8, 2, 4), (1, 65, 2, 8, 1, 4), (1, 1, 2, 8, 1, 4),
     (1, 1000, 2, 16, 1, 64)],
)  # fmt: skip
def test_chunks_are_the_recurrence(b, L, H, P, G, N):
    torch.manual_seed(0)
    x, B, C = torch.randn(b, L, H, P), torch.randn(b, L, G, N), torch.randn(b, L, G, N)
    dt, bias, A = torch.randn(b, L, H), torch.randn(H) - 3, -torch.rand(H) * 8 - 0.1
    want, last = slow_ssd(x, dt, A, B, C, dt_bias=bias)
    y, state = ssd.mamba_chunk_scan_combined(
        x, dt, A, B, C, 64, dt_bias=bias, dt_softplus=True, return_final_states=True
    )
    assert (y - want).abs().max() <= 2e-6 * want.abs().max()
    assert (state - last).abs().max() <= 2e-6 * last.abs().max()
    for D in (torch.randn(H), torch.randn(H, P)):
        z = torch.randn(b, L, H, P)
        want = slow_ssd(x, dt.abs(), A, B, C, D, z, softplus=False, limit=(0.1, 1.5))[0]
        y = ssd.mamba_chunk_scan_combined(x, dt.abs(), A, B, C, 256, D=D, z=z, dt_limit=(0.1, 1.5))
        assert (y - want).abs().max() <= 2e-6 * want.abs().max()


def test_strong_decays_lose_no_bits():
    """S falls to -8000: a difference of running sums would be off by 1e-3."""
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 64, 2, 4), torch.randn(1, 64, 1, 4), torch.randn(1, 64, 1, 4)
    dt, A = torch.rand(1, 64, 2) * 10, torch.tensor([-16.0, -1e-2])
    dt[:, ::2] *= 1e-3
    want = slow_ssd(x, dt, A, B, C, softplus=False)[0]
    y = ssd.mamba_chunk_scan_combined(x, dt, A, B, C, 64)
    assert (y - want).abs().max() <= 1e-6 * want.abs().max()


def test_ssd_refuses_states_by_name():
    with pytest.raises(UsageError, match="initial_states has no stand-in"):
        ssd.mamba_chunk_scan_combined(*[torch.ones(1, 2, 2, 2)] * 5, 64, initial_states=torch.ones(1))


def test_the_whole_layer_of_mamba2_says_that_headdim_is_missing():
    heads, groups, states, width = 2, 1, 3, 4
    channels = heads * width + 2 * groups * states
    tensors = (torch.randn(1, 5, heads * width + channels + heads), torch.randn(channels, 3), None)
    rest = (torch.zeros(heads), -torch.ones(heads), torch.ones(heads), 64)
    with pytest.raises(UsageError, match=r"headdim is missing, and D of shape \[2\] does not give it"):
        ssd.mamba_split_conv1d_scan_combined(*tensors, *rest)
    y = ssd.mamba_split_conv1d_scan_combined(*tensors, *rest, headdim=width)
    wide = (*rest[:2], torch.ones(heads, width), 64)
    assert torch.equal(y, ssd.mamba_split_conv1d_scan_combined(*tensors, *wide))


# ------------------------------------------------------------------------------------------------------------- imports


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(text) -> the module of this text, imported within cpu_mamba."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(text, **files):
        name = f"someones_mamba_{len(made)}"
        made.append(name)
        for other, content in files.items():
            (tmp_path / f"{other}.py").write_text(textwrap.dedent(content))
            made.append(other)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        with evm_deploy.cpu_mamba():
            return importlib.import_module(name)

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_nothing_is_left_behind(package):
    from torch.utils._triton import has_triton, has_triton_package

    modules, finders, triton = set(sys.modules), [*sys.meta_path], has_triton_package()
    apply, new_device = torch.autograd.Function.__dict__["apply"], torch.cuda.device
    module = package("import triton, triton.language as tl\nfrom mamba_ssm import Mamba\nimport selective_scan_cuda\n")
    assert module.Mamba is mamba1.Mamba
    with foreign_code():
        assert importlib.import_module("mamba_ssm").Mamba is mamba1.Mamba
    assert set(sys.modules) - modules == {module.__name__}
    assert sys.meta_path == finders
    assert has_triton_package() is triton and (triton or not has_triton())
    assert torch.autograd.Function.__dict__["apply"] is apply and torch.cuda.device is new_device
    with pytest.raises(ImportError):
        importlib.import_module("selective_scan_cuda")


def test_an_installed_package_is_not_replaced_but_its_triton_is(package):
    module = package(
        "import mamba_ssm\nfrom mamba_ssm.ops.triton.layer_norm import RMSNorm\n",
        mamba_ssm="__path__ = []\nreal = True\n",
    )
    assert module.mamba_ssm.real and module.RMSNorm is norms.RMSNorm


def test_triton_is_missing_for_those_who_can_do_without(package):
    guarded = "try:\n    import triton\nexcept ImportError:\n    triton = None\n"
    assert package(guarded).triton is None
    through = package("try:\n    from kernels import f\nexcept ImportError:\n    f = None\n", kernels="import triton\n")
    assert through.f is None
    assert package("import triton\n").triton.cdiv(7, 2) == 4


def test_kernels_can_be_defined_and_say_their_name_when_launched(package):
    module = package(
        """
        import triton
        import triton.language as tl
        from mamba_ssm import Mamba3
        from mamba_ssm.ops.triton.ssd_combined import _unknown

        @triton.autotune(configs=[triton.Config({"B": 1})], key=["n"])
        @triton.jit
        def swirl(x, n: tl.constexpr):
            tl.store(x, n)

        class Head(Mamba3):
            pass

        def run(x):
            swirl[(1,)](x, 3)
        """
    )
    assert issubclass(module.Head, torch.nn.Module)
    with pytest.raises(UsageError, match=r"the Triton kernel swirl has no form for the CPU; .*someones_mamba_0.py:\d+"):
        module.run(torch.ones(1))
    with pytest.raises(UsageError, match=r"ssd_combined\._unknown has no form"):
        module._unknown(torch.ones(1))
    with pytest.raises(UsageError, match=r"mamba_ssm\.Mamba3 has no form"):
        module.Mamba3(16)


def test_cuda_is_the_cpu_in_constructors(package):
    module = package("import torch\nx = torch.zeros(2, device='cuda')\nm = torch.nn.Linear(2, 2).to('cuda:0').cuda()\n")
    assert module.x.device.type == "cpu" and module.m.weight.device.type == "cpu"


def test_own_loops_are_the_op_where_they_are_the_same(package):
    """Negative control: a loop that adds u instead of D u stays."""
    source = Path(__file__).with_name("foreign_package.py").read_text()
    loop = source[source.index("def selective_scan_torch") : source.index("class OwnLoop")]
    head = "import torch\nimport torch.nn.functional as F\n"
    good, bad = package(head + loop), package(head + loop.replace("D[:, None] * u", "u"))
    assert good.selective_scan_torch.__module__ == own_loops.__name__
    assert bad.selective_scan_torch.__module__ == bad.__name__
    u, delta, A, B, C = case()
    close(good.selective_scan_torch(u, delta, A, B, C), slow(u, delta, A, B, C)[0])


def test_further_families(package, monkeypatch):
    for table in ("FIRST", "AUTOGRAD"):
        monkeypatch.setattr(stand_ins, table, dict(getattr(stand_ins, table)))
    monkeypatch.setattr("evm_deploy.model.foreign.running.AUTOGRAD", stand_ins.AUTOGRAD)
    evm_deploy.model.foreign.register("their_kernels.spin", lambda x: x.flip(-1))
    evm_deploy.model.foreign.register("Spin", lambda x, by: x.roll(by))
    module = package(
        """
        import torch
        from their_kernels import spin

        class Spin(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, by):
                raise RuntimeError("a kernel")
        """
    )
    assert module.spin(torch.arange(3)).tolist() == [2, 1, 0]
    with foreign_code():
        assert module.Spin.apply(torch.arange(3), 1).tolist() == [2, 0, 1]
    with pytest.raises(EvmError, match="is no name to register"):
        evm_deploy.model.foreign.register("a-b", None)


def test_tensor_subclasses_are_plain_while_a_module_runs(package):
    module = package("import torch\nclass T(torch.Tensor):\n    pass\n")
    x = torch.ones(2)
    with foreign_code():
        assert module.T(x) is x
    assert type(module.T(x)) is module.T


def test_the_golden_scans_of_vim_and_vmamba():
    from tests.conftest import TRAINED

    folder = TRAINED.parent / "golden" / "any_mamba"
    if not folder.is_dir():
        pytest.skip("../shared/golden/any_mamba is not beside this checkout")
    count = 0
    for name in ("vim", "vmamba"):
        data = np.load(folder / f"{name}.npz")
        for prefix in sorted({key.split("/")[0] for key in data.files if "/" in key}):
            call = {key: torch.from_numpy(data[f"{prefix}/{key}"]) for key in ("u", "delta", "A", "B", "C", "D")}
            y = scan(**call, delta_bias=torch.from_numpy(data[f"{prefix}/bias"]), delta_softplus=True)
            want = data[f"{prefix}/y"]
            assert np.abs(y.numpy() - want).max() <= 1e-6 * np.abs(want).max(), (name, prefix)
            count += 1
    assert count >= 4
