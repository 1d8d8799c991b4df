"""test_all.py - one test for every equation of the guide, and for everything else that the project promises.

    python -m pytest test_all.py            all of it, under 5 minutes on 2 cores, without a download or a GPU

First half: the equations, in order, against an independent form in float64, value and gradient. A test's name is the
claim. Second half: folders, checkpoints, resume, the command line, the scripts as a person runs them.
notes/mutants.py breaks each equation on purpose and sees its test go red.
"""

import inspect
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import dit
import psvae
import sample
import svae
from notes import pretrain_tiny

torch.set_num_threads(2)
HERE = Path(data.__file__).parent
STAGES = {"svae": svae, "psvae": psvae}


# ---------------------------------------------------------------------------------------------------------------------
# Independent forms, in float64 numpy
# ---------------------------------------------------------------------------------------------------------------------


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shaken(module, scale=0.3, seed=0):
    """A module in float64 with every parameter random, so that no zero or one of its initialisation hides an error."""
    g = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=g) * scale)
    return module


def weights(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def layer_norm_affine(x, w, name):
    return layer_norm(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def same(a, b, tolerance=1e-10):
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (a, b))
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def gradient(f, *inputs):
    """Gradients of f(*inputs).sum() with fresh leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    f(*leaves).sum().backward()
    return [leaf.grad for leaf in leaves]


def gradient_is_right(f, *inputs):
    """autograd against central differences, along every axis of every input."""
    assert torch.autograd.gradcheck(f, [x.detach().clone().requires_grad_() for x in inputs], atol=1e-7, rtol=1e-5)


@pytest.fixture(params=STAGES, ids=str)
def stage(request):
    return STAGES[request.param]


# ---------------------------------------------------------------------------------------------------------------------
# Fixtures: encoders of the real architectures, a small world, and a run of all stages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """(DINOv2 folder, T5 folder) of the smallest sizes, saved as the real ones are."""
    from transformers import Dinov2Config, Dinov2Model, T5Config, T5EncoderModel
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=28,
                             patch_size=14)).save_pretrained(folder / "image")
    tokenizer = pretrain_tiny.build_tokenizer(["a red circle above a blue square", "make the star green"] * 9, 400)
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_ff=32, d_kv=16, num_heads=2, num_layers=2,
                            feed_forward_proj="gated-gelu")).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return str(folder / "image"), str(folder / "text")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A built-in world of 120 pictures."""
    from notes import world
    folder = tmp_path_factory.mktemp("world") / "world"
    world.write(folder, count=120)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, world, encoders):
    """An out folder in which all stages ran for a few steps; tests that write into it take a copy."""
    out = tmp_path_factory.mktemp("trained") / "out"
    shutil.copytree(world, out / "world")
    few = ["--out", str(out), "--steps", "4", "--batch", "4", "--warmup", "1", "--log-every", "1", "--eval-every", "2",
           "--save-every", "2", "--workers", "0"]
    assert svae.main([*few, "--encoder", encoders[0], "--image-size", "32", "--z-dim", "8"]) == 0
    assert psvae.main([*few, "--widths", "16,16,8,8"]) == 0
    assert dit.main([*few, "--text-encoder", encoders[1], "--width", "32", "--depth", "2", "--heads", "2"]) == 0
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The equations: problem formulation
# ---------------------------------------------------------------------------------------------------------------------


def test_eq_2_contrastive_loss_is_minus_log_of_the_positive_share():
    f, g, tau = randn(5, 4), randn(5, 4, seed=1), 0.3
    a, b = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (f, g))
    expected = 0
    for i in range(5):
        terms = [math.exp(a[i] @ b[k] / tau) for k in range(5)]
        expected += -math.log(terms[i] / sum(terms)) / 5
    none = torch.zeros(5, 5, dtype=torch.bool)
    same(pretrain_tiny.contrastive_loss(f, g, torch.tensor(tau, dtype=torch.float64), none), expected)
    gradient_is_right(lambda f, g: pretrain_tiny.contrastive_loss(f, g, torch.tensor(tau), none), f, g)


def test_eq_2_equal_captions_are_no_negatives():
    f, tau = randn(3, 4), torch.tensor(0.5)
    g = torch.stack([f[0], f[0], f[2]])
    twins = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    with_twin = pretrain_tiny.contrastive_loss(f, g, tau, twins)
    a, b = F.normalize(f, dim=1), F.normalize(g, dim=1)
    rows = []
    for i, others in ((0, (0, 2)), (1, (1, 2)), (2, (0, 1, 2))):
        rows.append(-math.log(math.exp(a[i] @ b[i] / 0.5) / sum(math.exp(a[i] @ b[k] / 0.5) for k in others)))
    same(with_twin, np.mean(rows), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# S-VAE
# ---------------------------------------------------------------------------------------------------------------------


def test_eq_4_the_frozen_encoder_takes_no_gradient_and_stays_as_it_was(encoders, tmp_path, world):
    before = data.fingerprint(data.load_image_encoder(encoders[0]))
    encoder = data.load_image_encoder(encoders[0]).requires_grad_(False)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    f = encoder(x.detach())
    assert f.shape == (2, 2, 2, 48) and not f.requires_grad
    model = svae.SVAE(48, 8)
    f_hat, mu, log_var = model(f, torch.randn(2, 2, 2, 8))
    svae.svae_loss(f_hat, f, mu, log_var, 1e-4)["loss"].backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert data.fingerprint(encoder) == before


def projector_by_hand(f, w):
    h = gelu(layer_norm_affine(linear(f, w, "body.0"), w, "body.1"))
    h = gelu(layer_norm_affine(linear(h, w, "body.3"), w, "body.4"))
    return linear(h, w, "mu"), np.clip(linear(h, w, "log_var"), -30, 20)


def test_eq_5_projector(stage):
    module, f = shaken(stage.Projector(10, 6), 0.1), randn(2, 3, 3, 10)
    mu, log_var = module(f)
    expected = projector_by_hand(f.numpy(), weights(module))
    same(mu, expected[0])
    same(log_var, expected[1])
    assert [m.out_features for m in module.body if isinstance(m, torch.nn.Linear)] == [512, 256]
    gradient_is_right(lambda f: module(f), f[:1, :1, :1])


def test_eq_5_log_var_is_clamped_where_exp_would_overflow(stage):
    module = shaken(stage.Projector(4, 2), 0.1)
    with torch.no_grad():
        module.log_var.bias.copy_(torch.tensor([1e4, -1e4]))
    same(module(randn(1, 4))[1], torch.tensor([[20.0, -30.0]], dtype=torch.float64))


def test_eq_6_reparameterization(stage):
    mu, log_var, eps = randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2)
    sigma = np.exp(log_var.numpy()) ** 0.5
    same(stage.reparameterize(mu, log_var, eps), mu.numpy() + sigma * eps.numpy())
    d_mu, d_log_var = gradient(lambda m, v: stage.reparameterize(m, v, eps), mu, log_var)
    same(d_mu, np.ones((2, 3)))
    same(d_log_var, 0.5 * sigma * eps.numpy())
    same(dit.sample_z_0(mu, log_var, eps), stage.reparameterize(mu, log_var, eps))


def test_eq_7_semantic_decoder(stage):
    module, z = shaken(stage.SemanticDecoder(10, 6), 0.1), randn(2, 3, 3, 6)
    w = weights(module)
    h = gelu(layer_norm_affine(linear(z.numpy(), w, "body.0"), w, "body.1"))
    h = gelu(layer_norm_affine(linear(h, w, "body.3"), w, "body.4"))
    h = linear(h, w, "body.6")
    for block in ("body.7", "body.8"):
        inner = gelu(linear(layer_norm_affine(h, w, f"{block}.body.0"), w, f"{block}.body.1"))
        h = h + linear(inner, w, f"{block}.body.3")
    same(module(z), h)
    assert [module.body[i].out_features for i in (0, 3, 6)] == [256, 512, 10]
    gradient_is_right(module, z[:1, :1, :1])


@pytest.mark.parametrize("beta", [0.0, 1e-4, 3.0])
def test_eq_8_s_vae_loss_is_semantic_plus_beta_kl(beta):
    f_hat, f, mu, log_var = (randn(2, 2, 2, 5, seed=i) for i in range(4))
    losses = svae.svae_loss(f_hat, f, mu, log_var, beta)
    kl = -0.5 * (1 + log_var.numpy() - mu.numpy() ** 2 - np.exp(log_var.numpy()))
    same(losses["semantic"], ((f_hat.numpy() - f.numpy()) ** 2).mean())
    same(losses["kl"], kl.sum(-1).mean())
    same(losses["loss"], ((f_hat.numpy() - f.numpy()) ** 2).mean() + beta * kl.sum(-1).mean())


def test_eq_8_beta_is_the_guides_in_both_stages():
    assert svae.Config().beta == psvae.Config().beta == 1e-4


def test_eq_9_semantic_loss_is_the_mean_over_h_w_d():
    f_hat, f = randn(1, 2, 3, 4), randn(1, 2, 3, 4, seed=1)
    expected = sum((f_hat[0, i, j, k].item() - f[0, i, j, k].item()) ** 2
                   for i in range(2) for j in range(3) for k in range(4)) / (2 * 3 * 4)
    same(svae.semantic_loss(f_hat, f), expected)
    same(gradient(svae.semantic_loss, f_hat, f)[0], 2 * (f_hat - f).numpy() / 24)


def test_eq_10_kl_is_that_of_torch_distributions_and_zero_for_the_prior(stage):
    mu, log_var = randn(3, 2, 2, 5), randn(3, 2, 2, 5, seed=1)
    q = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    p = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    same(stage.kl_divergence(mu, log_var), torch.distributions.kl_divergence(q, p).sum(-1).mean())
    zeros = torch.zeros(1, 1, 1, 7)
    assert stage.kl_divergence(zeros, zeros).item() == 0
    assert stage.kl_divergence(mu, log_var) > 0


def test_eq_11_kl_sums_over_channels_and_averages_over_positions(stage):
    mu, log_var = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    expected = 0
    for b in range(2):
        for n in range(3):
            expected += -0.5 * sum(1 + log_var[b, n, i].item() - mu[b, n, i].item() ** 2 - math.exp(log_var[b, n, i].item())
                                   for i in range(4)) / 6
    same(stage.kl_divergence(mu, log_var), expected)
    d_mu, d_log_var = gradient(stage.kl_divergence, mu, log_var)
    same(d_mu, mu.numpy() / 6)
    same(d_log_var, 0.5 * (np.exp(log_var.numpy()) - 1) / 6)
    twice = stage.kl_divergence(torch.cat([mu, mu], -1), torch.cat([log_var, log_var], -1))
    same(twice, 2 * stage.kl_divergence(mu, log_var))


# ---------------------------------------------------------------------------------------------------------------------
# PS-VAE
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Projector", "ResidualBlock", "SemanticDecoder", "reparameterize", "kl_divergence"])
def test_what_both_stages_define_is_one_text(name):
    assert inspect.getsource(getattr(svae, name)) == inspect.getsource(getattr(psvae, name))


@pytest.fixture
def micro_psvae(encoders):
    torch.manual_seed(0)
    return psvae.PSVAE(data.load_image_encoder(encoders[0]), 8, (16, 16, 8, 8)).train()


@pytest.mark.parametrize("term", ["semantic", "pixel", "kl"])
def test_eq_12_every_term_reaches_the_trainable_encoder(micro_psvae, term):
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    x_hat, f_hat, mu, log_var = micro_psvae(x, torch.randn(2, 2, 2, 8))
    losses = psvae.psvae_loss(x_hat, x, f_hat, torch.randn_like(f_hat), mu, log_var, psvae.Config(lpips_weight=0.0))
    losses[term].backward()
    grads = {name: p.grad for name, p in micro_psvae.encoder.named_parameters() if p.requires_grad}
    assert len(grads) > 20 and all(g is not None and g.abs().sum() > 0 for g in grads.values())


def test_eq_13_the_target_comes_from_the_frozen_encoder_not_the_trained_one(trained, encoders):
    """The last row of psvae.csv, computed again with the encoder that was never trained."""
    model, checkpoint = psvae.load_psvae(trained / "psvae.pt")
    cfg = data.configure(psvae.Config, psvae.PRESETS, {}, saved=checkpoint["config"])
    x = data.Run.held_out(type("R", (), {"device": "cpu"}), data.read_folder("", out=str(trained))[1], cfg.image_size)
    row = (trained / "psvae.csv").read_text().splitlines()
    logged = float(dict(zip(row[0].split(","), row[-1].split(",")))["held_out_semantic"])
    frozen = psvae.held_out_losses(model, data.load_image_encoder(encoders[0]), x, cfg)["semantic"]
    moving = psvae.held_out_losses(model, model.encoder, x, cfg)["semantic"]
    assert math.isclose(frozen, logged, rel_tol=1e-4)
    assert not math.isclose(moving, logged, rel_tol=1e-3), "the trained encoder has not moved: the test says nothing"


def group_norm(x, w, name, c):
    groups = min(32, c // 4)
    y = x.reshape(len(x), groups, -1)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return y.reshape(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def conv(x, w, name):
    """3 x 3 with a border of zeros, as nine shifted products."""
    padded, out = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), 0
    for i in range(3):
        for j in range(3):
            window = padded[:, :, i:i + x.shape[2], j:j + x.shape[3]]
            out = out + np.einsum("oc,bchw->bohw", w[f"{name}.weight"][:, :, i, j], window)
    return out + w[f"{name}.bias"][:, None, None]


def test_eq_14_pixel_decoder():
    widths = (16, 16, 8, 8)
    module, z = shaken(psvae.PixelDecoder(6, widths), 0.2), randn(2, 2, 2, 6)
    w = weights(module)
    x = silu(group_norm(conv(z.numpy().transpose(0, 3, 1, 2), w, "stem.0"), w, "stem.1", 16))
    for level, (c_in, c_out) in enumerate(zip((16, *widths), widths)):
        for block in (0, 1):
            name = f"levels.{level}.{block}.body"
            y = conv(silu(group_norm(x, w, f"{name}.0", c_in)), w, f"{name}.2")
            x = x + conv(silu(group_norm(y, w, f"{name}.3", c_in)), w, f"{name}.5")
        x = x.repeat(2, 2).repeat(2, 3)
        x = conv(x, w, f"levels.{level}.3")
    x = conv(silu(group_norm(x, w, "head.0", 8)), w, "head.2")
    assert x.shape == (2, 3, 32, 32)
    same(module(z), x)
    gradient_is_right(lambda z: module(z).mean((2, 3)), z[:1])


def test_eq_14_full_pixel_decoder_has_the_guides_sizes():
    with torch.device("meta"):
        module = psvae.PixelDecoder(96, psvae.Config().widths)
        assert module(torch.empty(1, 16, 16, 96)).shape == (1, 3, 256, 256)
    convs = [(c.in_channels, c.out_channels) for c in module.modules() if isinstance(c, torch.nn.Conv2d)]
    assert convs[0] == (96, 512) and convs[-1] == (128, 3)
    assert [convs[i] for i in (5, 10, 15, 20)] == [(512, 512), (512, 512), (512, 256), (256, 128)]


def test_eq_15_ps_vae_loss_is_the_weighted_sum_of_four():
    x_hat, x = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    f_hat, f, mu, log_var = (randn(2, 2, 2, 5, seed=i) for i in range(2, 6))
    cfg = psvae.Config(alpha=2.0, gamma=3.0, lpips_weight=5.0, beta=7.0)
    losses = psvae.psvae_loss(x_hat, x, f_hat, f, mu, log_var, cfg, lpips=lambda a, b: (a - b).abs().amax((1, 2, 3)))
    d, kl = (x_hat - x).numpy(), -0.5 * (1 + log_var.numpy() - mu.numpy() ** 2 - np.exp(log_var.numpy())).sum(-1).mean()
    parts = ((f_hat - f).numpy() ** 2).mean(), (abs(d) + d ** 2).mean() / 2, abs(d).max((1, 2, 3)).mean(), kl
    same(losses["loss"], 2 * parts[0] + 3 * parts[1] + 5 * parts[2] + 7 * parts[3])
    for name, value in zip(("semantic", "pixel", "perceptual", "kl"), parts):
        same(losses[name], value)


def test_eq_15_default_weights_are_the_guides():
    cfg = psvae.Config()
    assert (cfg.alpha, cfg.gamma, cfg.lpips_weight, cfg.beta) == (1.0, 1.0, 0.1, 1e-4)


def test_eq_16_semantic_loss_against_the_frozen_target():
    f_hat, target = randn(2, 2, 2, 3), randn(2, 2, 2, 3, seed=1)
    same(psvae.semantic_loss(f_hat, target), ((f_hat.numpy() - target.numpy()) ** 2).sum() / 24)
    same(gradient(lambda f: psvae.semantic_loss(f, target), f_hat)[0], 2 * (f_hat - target).numpy() / 24)


def test_eq_17_pixel_loss_is_half_l1_and_half_mse_without_a_clamp():
    x_hat, x = 3 * randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1).clamp(-1, 1)
    d = (x_hat - x).numpy()
    same(psvae.pixel_loss(x_hat, x), 0.5 * abs(d).mean() + 0.5 * (d ** 2).mean())
    same(gradient(lambda a: psvae.pixel_loss(a, x), x_hat)[0], (0.5 * np.sign(d) + d) / d.size)


def test_eq_18_l1_is_the_mean_over_h_w_c():
    x_hat, x = randn(1, 3, 2, 2), randn(1, 3, 2, 2, seed=1)
    expected = sum(abs(x_hat[0, c, i, j].item() - x[0, c, i, j].item())
                   for c in range(3) for i in range(2) for j in range(2)) / 12
    same(psvae.l1(x_hat, x), expected)


@pytest.fixture(scope="module")
def lpips():
    """data.load_lpips() with a random VGG16 trunk (its weights are a download) and the calibrated linear weights."""
    package = pytest.importorskip("lpips", reason="lpips needs torchvision, which this torch build has none of")
    with pytest.MonkeyPatch.context() as patch:
        kind = package.LPIPS
        patch.setattr(package, "LPIPS", lambda **kwargs: kind(**kwargs, pnet_rand=True))
        torch.manual_seed(0)
        return data.load_lpips("cpu").double()


def test_eq_19_lpips_is_the_weighted_distance_of_unit_vgg_features(lpips):
    x_hat, x = randn(2, 3, 32, 32).clamp(-1, 1), randn(2, 3, 32, 32, seed=1).clamp(-1, 1)
    shift = torch.tensor([-.030, -.088, -.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([.458, .448, .450], dtype=torch.float64).view(1, 3, 1, 1)
    expected = torch.zeros(2, dtype=torch.float64)
    a, b = ((p - shift) / scale for p in (x_hat, x))
    for number in range(1, 6):
        part, lin = getattr(lpips.net, f"slice{number}"), lpips.lins[number - 1].model[-1].weight
        a, b = part(a), part(b)
        unit_a, unit_b = (p / p.norm(dim=1, keepdim=True).clamp(min=1e-10) for p in (a, b))
        w = lin.flatten().sqrt()                                            # lpips keeps the squares of the guide's w
        expected += ((w.view(1, -1, 1, 1) * (unit_a - unit_b)) ** 2).sum(1).mean((1, 2))
    same(psvae.perceptual_loss(lpips, x_hat, x), expected.mean(), 1e-6)
    assert psvae.perceptual_loss(lpips, x, x).item() == 0
    assert psvae.perceptual_loss(None, x_hat, x).item() == 0


def test_eq_19_lpips_is_frozen_and_its_gradient_is_finite_on_flat_pictures(lpips):
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training
    x_hat = torch.zeros(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    psvae.perceptual_loss(lpips, x_hat, torch.ones_like(x_hat)).backward()
    assert torch.isfinite(x_hat.grad).all()
    dead = torch.zeros(1, 4, 2, 2, requires_grad=True)                      # features all zero, as after a dead ReLU
    data._unit_normalize(dead).sum().backward()
    assert torch.isfinite(dead.grad).all()


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion process
# ---------------------------------------------------------------------------------------------------------------------


def test_eq_20_forward_process_has_mean_and_variance_of_q():
    alpha_bar = dit.noise_schedule(100, 1e-4, 0.02)
    z_0, t = torch.full((20_000, 1, 1, 1), 1.7, dtype=torch.float64), torch.full((20_000,), 60)
    z_t = dit.add_noise(z_0, t, randn(20_000, 1, 1, 1), alpha_bar)
    ab = alpha_bar[60].item()
    assert abs(z_t.mean().item() - math.sqrt(ab) * 1.7) < 0.02
    assert abs(z_t.var().item() / (1 - ab) - 1) < 0.04


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_eq_21_alpha_bar_is_the_product_of_one_minus_beta(schedule):
    T, low, high, product, expected = 1000, 1e-4, 0.02, 1.0, [1.0]
    for s in range(T):
        if schedule == "linear":
            beta = low + (high - low) * s / (T - 1)
        else:
            beta = (math.sqrt(low) + (math.sqrt(high) - math.sqrt(low)) * s / (T - 1)) ** 2
        product *= 1 - beta
        expected.append(product)
    alpha_bar = dit.noise_schedule(T, low, high, schedule)
    same(alpha_bar, np.array(expected), 1e-9)
    assert alpha_bar[0] == 1 and alpha_bar.dtype == torch.float64
    assert math.isclose(alpha_bar[-1].item(), {"linear": 4.04e-5, "scaled_linear": 7.33e-4}[schedule], rel_tol=2e-3)
    assert (dit.Config().beta_start, dit.Config().beta_end, dit.Config().schedule) == (1e-4, 0.02, "scaled_linear")


def test_eq_22_z_t_in_closed_form_and_back():
    alpha_bar = dit.noise_schedule(1000, 1e-4, 0.02)
    z_0, eps, t = randn(3, 2, 2, 4), randn(3, 2, 2, 4, seed=1), torch.tensor([1, 500, 1000])
    ab = alpha_bar.numpy()[t.numpy()].reshape(3, 1, 1, 1)
    z_t = dit.add_noise(z_0, t, eps, alpha_bar)
    same(z_t, np.sqrt(ab) * z_0.numpy() + np.sqrt(1 - ab) * eps.numpy())
    same(dit.predict_z_0(z_t, t, eps, alpha_bar), z_0, 1e-9)
    d_z, d_eps = gradient(lambda z, e: dit.add_noise(z, t, e, alpha_bar), z_0, eps)
    same(d_z, np.broadcast_to(np.sqrt(ab), z_0.shape))
    same(d_eps, np.broadcast_to(np.sqrt(1 - ab), z_0.shape))
    assert dit.add_noise(z_0.float(), t, eps.float(), alpha_bar).dtype == torch.float32


@pytest.mark.parametrize("t", [1, 2, 37, 50])
def test_eq_23_ddim_with_eta_1_and_all_steps_is_the_ddpm_posterior(t):
    ab = dit.noise_schedule(50, 1e-3, 0.2).tolist()
    z_t, eps, noise = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    beta = 1 - ab[t] / ab[t - 1]
    z_0 = (z_t - math.sqrt(1 - ab[t]) * eps) / math.sqrt(ab[t])
    mean = (math.sqrt(ab[t - 1]) * beta * z_0 + math.sqrt(1 - beta) * (1 - ab[t - 1]) * z_t) / (1 - ab[t])
    deviation = math.sqrt((1 - ab[t - 1]) / (1 - ab[t]) * beta)
    same(sample.ddim_step(z_t, eps, ab[t], ab[t - 1], 1.0, noise)[0], mean + deviation * noise, 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# DiT architecture
# ---------------------------------------------------------------------------------------------------------------------


def micro_dit(depth=2, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = dit.DiT(grid=2, z_dim=3, d_text=5, width=12, depth=depth, heads=2, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model


def micro_batch(B=2, L=4, seed=0, dtype=torch.float32):
    z, c = randn(B, 2, 2, 3, seed=seed).to(dtype), randn(B, L, 5, seed=seed + 1).to(dtype)
    return z, torch.arange(1, B + 1) * 300, c, torch.ones(B, L, dtype=torch.bool)


def first_tokens(model, *batch):
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*batch)
    hook.remove()
    return seen[0]


def test_eq_24_h_0_is_linear_of_every_position_plus_pe():
    model, (z, t, c, mask) = micro_dit(), micro_batch()
    w, h_0 = weights(model), first_tokens(model, z, t, c, mask)
    for row in range(2):
        for column in range(2):                                             # row-major, each position its own PE
            expected = z[:, row, column].numpy() @ w["embed.weight"].T + w["embed.bias"] + w["position"][0, 2 * row + column]
            same(h_0[:, 2 * row + column], expected, 1e-5)
    assert h_0.shape == (2, 4, 12)


def test_source_tokens_have_the_same_positions_and_their_own_type():
    model, (z, t, c, mask) = micro_dit(), micro_batch()
    source = randn(2, 2, 2, 3, seed=9).float()
    with_source, plain = first_tokens(model, z, t, c, mask, source), first_tokens(model, source, t, c, mask)
    same(with_source[:, :4], first_tokens(model, z, t, c, mask), 1e-6)
    same(with_source[:, 4:], plain + model.source_type, 1e-6)
    out = model(z, t, c, mask, source)
    assert out.shape == z.shape and not torch.allclose(out, model(z, t, c, mask), atol=1e-3)


def test_eq_25_timestep_embedding():
    t, d = torch.tensor([1, 17, 1000]), 8
    expected = np.array([[math.sin(v / 10000 ** (2 * i / d)) for i in range(d // 2)] +
                         [math.cos(v / 10000 ** (2 * i / d)) for i in range(d // 2)] for v in t.tolist()])
    same(dit.timestep_embedding(t, d).double(), expected, 1e-4)
    embeddings = dit.timestep_embedding(torch.arange(0, 1001), 256)
    assert embeddings.shape == (1001, 256) and embeddings.dtype == torch.float32
    assert torch.pdist(embeddings[::50]).min() > 0.1 and (embeddings[999] - embeddings[1000]).norm() > 0.1


def test_eq_25_its_mlp_is_linear_silu_linear():
    model, t = micro_dit(), torch.tensor([3, 400])
    w, e = weights(model), dit.timestep_embedding(t, 256).numpy()
    t_emb = linear(silu(linear(e, w, "time.0")), w, "time.2")
    same(model.modulations(t)[-1], linear(silu(t_emb), w, "head_modulation.1"), 1e-4)


def test_eq_26_text_is_encoded_by_a_frozen_encoder_and_padding_is_never_read(encoders):
    encoder = data.load_text_encoder(encoders[1])
    c, mask = encoder(["a red circle above a blue square", "a star", ""])
    assert c.shape[:2] == mask.shape and c.shape[2] == encoder.dim and not c.requires_grad
    assert mask[2].tolist() == [True] + [False] * (mask.shape[1] - 1)       # "" is the single token </s>
    assert not any(p.requires_grad for p in encoder.network.parameters())
    model, (z, t, c, mask) = micro_dit(), micro_batch(L=4)
    mask[:, 2:] = False
    noisy = torch.where(mask[..., None], c, torch.full_like(c, 1e4))
    same(model(z, t, c, mask), model(z, t, noisy, mask), 1e-6)
    assert not torch.allclose(model(z, t, c, mask), model(z, t, c + 1, mask), atol=1e-4)


def test_eq_27_adaln_scales_and_shifts_a_layer_norm_without_weights():
    h, gamma, beta = randn(2, 3, 6), randn(2, 1, 6, seed=1), randn(2, 1, 6, seed=2)
    same(dit.adaln(h, gamma, beta), gamma.numpy() * layer_norm(h.numpy()) + beta.numpy())
    gradient_is_right(dit.adaln, h, gamma, beta)


def attention_by_hand(q, k, v, heads, mask=None):
    out = np.zeros_like(q)
    d = q.shape[-1] // heads
    for b in range(len(q)):
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(d)
            out[b, :, part] = softmax(scores if mask is None else np.where(mask[b], scores, -np.inf)) @ v[b, :, part]
    return out


def test_eq_28_self_attention():
    module, h = shaken(dit.SelfAttention(12, 3)), randn(2, 4, 12)
    w = weights(module)
    q, k, v = np.split(linear(h.numpy(), w, "qkv"), 3, axis=-1)
    same(module(h), linear(attention_by_hand(q, k, v, 3), w, "out"))
    gradient_is_right(module, h[:1, :2])


def test_eq_29_cross_attention_reads_the_text_under_its_mask():
    module, h, c = shaken(dit.CrossAttention(12, 3)), randn(2, 4, 12), randn(2, 5, 12, seed=1)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    w = weights(module)
    k, v = np.split(linear(c.numpy(), w, "kv"), 2, axis=-1)
    expected = linear(attention_by_hand(linear(h.numpy(), w, "q"), k, v, 3, mask.numpy()[:, None]), w, "out")
    same(module(h, *module.keys_values(c), mask[:, None, None]), expected)
    gradient_is_right(lambda h, c: module(h, *module.keys_values(c), mask[:1, None, None]), h[:1, :2], c[:1])


def test_eq_30_ffn():
    module, h = shaken(dit.FFN(6)), randn(2, 3, 6)
    w = weights(module)
    same(module(h), linear(gelu(linear(h.numpy(), w, "w_1")), w, "w_2"))
    assert module.w_1.out_features == 24
    gradient_is_right(module, h[:1, :1])


def test_eq_31_each_of_the_three_residuals_has_its_own_gate():
    block, h, c = shaken(dit.DiTBlock(12, 3)), randn(2, 4, 12), randn(2, 5, 12, seed=1)
    modulation, mask = randn(2, 9 * 12, seed=2), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    k, v = block.cross.keys_values(c)
    gamma_1, beta_1, gate_1, gamma_2, beta_2, gate_2, gamma_3, beta_3, gate_3 = np.split(modulation.numpy()[:, None], 9, -1)

    def norm(h, gamma, beta):
        return torch.from_numpy((1 + gamma) * layer_norm(h) + beta)

    expected = h.numpy()
    expected = expected + gate_1 * block.attention(norm(expected, gamma_1, beta_1)).detach().numpy()
    expected = expected + gate_2 * block.cross(norm(expected, gamma_2, beta_2), k, v, mask).detach().numpy()
    expected = expected + gate_3 * block.ffn(norm(expected, gamma_3, beta_3)).detach().numpy()
    same(block(h, modulation, k, v, mask), expected)
    same(block(h, torch.zeros_like(modulation), k, v, mask), h)             # gates of 0: nothing is added


def test_eq_31_a_fresh_block_is_the_identity_and_a_fresh_dit_predicts_zero():
    torch.manual_seed(0)
    block = dit.DiTBlock(12, 3)
    h, c, t_emb = torch.randn(2, 4, 12), torch.randn(2, 5, 12), torch.randn(2, 12)
    k, v = block.cross.keys_values(c)
    assert torch.equal(block(h, block.modulation(t_emb), k, v, torch.ones(2, 1, 1, 5, dtype=torch.bool)), h)
    z, t, c, mask = micro_batch()
    assert not dit.DiT(2, 3, 5, 12, 2, 2)(z, t, c, mask).any()


def test_the_head_is_adaln_and_linear():
    model, (z, t, c, mask) = micro_dit(depth=0), micro_batch()
    w = weights(model)
    h = linear(z.numpy().reshape(2, 4, 3), w, "embed") + w["position"]
    gamma, beta = np.split(model.modulations(t)[-1].detach().numpy()[:, None], 2, -1)
    same(model(z, t, c, mask), linear((1 + gamma) * layer_norm(h) + beta, w, "head").reshape(2, 2, 2, 3), 1e-4)


def test_recomputing_activations_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = micro_dit(checkpointing=checkpointing).train()
        model(*micro_batch()).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    same(*grads, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Training objective
# ---------------------------------------------------------------------------------------------------------------------


def test_eq_32_loss_is_the_mean_squared_error_of_the_noise():
    eps, eps_hat = randn(2, 2, 2, 3), randn(2, 2, 2, 3, seed=1)
    same(dit.dit_loss(eps, eps_hat), ((eps.numpy() - eps_hat.numpy()) ** 2).mean())
    same(gradient(lambda e: dit.dit_loss(eps, e), eps_hat)[0], 2 * (eps_hat - eps).numpy() / 24)


def test_eq_32_t_is_uniform_over_1_to_T_with_both_ends():
    run = object.__new__(data.Run)
    run.cfg, run.stage, run.device, run.rank, run.world = dit.Config(batch=4000), "dit", torch.device("cpu"), 0, 1
    t = run.randint(0, "t", 1, 10 + 1)
    assert t.unique().tolist() == list(range(1, 11)) and t.bincount()[1:].min() > 320


def test_latents_are_normalised_to_mean_0_variance_1_and_back():
    rng = np.random.default_rng(0)
    mu = (rng.normal(size=(500, 2, 2, 3)) * [1, 5, 0.2] + [3, 0, -1]).astype(np.float16)
    log_var = rng.normal(size=(500, 2, 2, 3)).astype(np.float16)
    rows = np.arange(0, 500, 2)
    mean, variance = psvae.channel_statistics([mu, log_var], rows)
    flat, flat_var = (a[rows].astype(np.float64).reshape(-1, 3) for a in (mu, log_var))
    same(mean, flat.mean(0))
    same(variance, flat.var(0) + np.exp(flat_var).mean(0), 1e-9)            # Var(z) = Var(mu) + E[sigma^2]
    same(psvae.channel_statistics([mu], rows)[1], flat.var(0), 1e-9)
    z = torch.from_numpy(flat)
    back = dit.normalise(z, torch.from_numpy(mean), torch.from_numpy(variance)) * torch.from_numpy(variance).sqrt() + torch.from_numpy(mean)
    same(back, z)
    sampled = dit.sample_z_0(z, torch.from_numpy(flat_var), randn(*z.shape))
    normal = dit.normalise(sampled, torch.from_numpy(mean), torch.from_numpy(variance))
    assert normal.mean(0).abs().max() < 0.1 and (normal.var(0) - 1).abs().max() < 0.15


def test_edit_batches_are_evenly_spread_and_rows_are_each_seen_once_an_epoch():
    cfg = dit.Config(batch=4, edit_fraction=0.3, drop_text=0.1, drop_both=0.05)
    captions, edits = list(range(100, 140)), list(range(200, 212))
    seen = {"caption": [], "edit": []}
    for step in range(100):
        rows = [row for row, _, _ in dit.keys_of_step(step, cfg, captions, edits)]
        kinds = {"edit" if row >= 200 else "caption" for row in rows}
        assert len(kinds) == 1, "a batch is of one kind"
        seen[kinds.pop()] += rows
    assert len(seen["edit"]) == 30 * 4
    assert sorted(seen["caption"][:40]) == captions and sorted(seen["edit"][:12]) == edits
    assert all(row >= 200 for row, _, _ in dit.keys_of_step(5, cfg, [], edits))
    assert all(row < 200 for row, _, _ in dit.keys_of_step(5, cfg, captions, []))


def test_text_is_dropped_at_its_rate_and_the_source_never_alone():
    cfg = dit.Config(batch=50, edit_fraction=0.5, drop_text=0.1, drop_both=0.05)
    keys = [key for step in range(400) for key in dit.keys_of_step(step, cfg, list(range(60)), list(range(100, 160)))]
    captions, edits = [k for k in keys if k[0] < 100], [k for k in keys if k[0] >= 100]
    assert not any(drop_source for _, _, drop_source in captions)
    assert all(drop_text for _, drop_text, drop_source in edits if drop_source)
    assert abs(np.mean([k[1] for k in captions]) - 0.1) < 0.015
    assert 0.01 < np.mean([k[2] for k in edits]) < 0.1
    assert abs(np.mean([k[1] for k in edits if not k[2]]) - 0.1) < 0.015


# ---------------------------------------------------------------------------------------------------------------------
# Inference
# ---------------------------------------------------------------------------------------------------------------------


def test_eq_33_guidance():
    null, c = randn(2, 2, 2, 3), randn(2, 2, 2, 3, seed=1)
    same(sample.classifier_free_guidance(null, c, 7.5), null.numpy() + 7.5 * (c.numpy() - null.numpy()))
    same(sample.classifier_free_guidance(null, c, 1.0), c)
    same(sample.classifier_free_guidance(null, c, 0.0), null)
    assert sample.Config(prompt=("x",)).guidance == 7.5


def passes(model, z, t, c, mask, null, source=None):
    both, masks = torch.cat([c, null]), torch.cat([mask, mask])
    return [m[:1] for m in model.modulations(t)], model.keys_values(both), masks


@pytest.mark.parametrize("s", [0.0, 1.0, 7.5])
def test_eq_33_both_halves_in_one_batch_equal_two_passes(s):
    model, (z, _, c, mask) = micro_dit(), micro_batch()
    t, null = torch.tensor([500, 500]), randn(2, 4, 5, seed=7).float()
    modulations, keys_values, masks = passes(model, z, t, c, mask, null)
    eps = sample.guided_noise(model, z, modulations, keys_values, masks, None, s, 1.0)
    eps_c, eps_null = model(z, t, c, mask), model(z, t, null, mask)
    same(eps, eps_null + s * (eps_c - eps_null), 1e-4)


@pytest.mark.parametrize("s, s_image", [(4.0, 1.5), (4.0, 1.0), (1.5, 1.5), (1.0, 1.0)])
def test_edit_guidance_weighs_source_and_text_and_skips_passes_of_weight_0(s, s_image):
    model, (z, _, c, mask) = micro_dit(), micro_batch()
    t, null, source = torch.tensor([500, 500]), randn(2, 4, 5, seed=7).float(), randn(2, 2, 2, 3, seed=8).float()
    modulations, keys_values, masks = passes(model, z, t, c, mask, null)
    rows, denoise = [], model.denoise
    model.denoise = lambda z, *args: rows.append(len(z)) or denoise(z, *args)
    eps = sample.guided_noise(model, z, modulations, keys_values, masks, source, s, s_image)
    assert sum(rows) == 2 * (1 + (s != s_image) + (s_image != 1))
    eps_00, eps_s0, eps_sc = model(z, t, null, mask), model(z, t, null, mask, source), model(z, t, c, mask, source)
    same(eps, (1 - s_image) * eps_00 + (s_image - s) * eps_s0 + s * eps_sc, 1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_eq_34_ddim_step(eta):
    z_t, eps, noise, ab_t, ab_prev = randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2), 0.3, 0.8
    sigma = eta * math.sqrt((1 - ab_prev) / (1 - ab_t)) * math.sqrt(1 - ab_t / ab_prev)
    z_0 = (z_t.numpy() - math.sqrt(1 - ab_t) * eps.numpy()) / math.sqrt(ab_t)
    expected = math.sqrt(ab_prev) * z_0 + math.sqrt(1 - ab_prev - sigma ** 2) * eps.numpy() + sigma * noise.numpy()
    z_prev, predicted = sample.ddim_step(z_t, eps, ab_t, ab_prev, eta, noise)
    same(z_prev, expected)
    same(predicted, z_0)


class Oracle:
    """A DiT that knows the noise of one z_0: whatever the times, DDIM must land on z_0."""

    def __init__(self, z_0, alpha_bar):
        self.z_0, self.alpha_bar = z_0, alpha_bar

    def keys_values(self, c):
        return []

    def modulations(self, t):
        return [t]

    def denoise(self, z_t, modulations, keys_values, mask, source=None):
        ab = self.alpha_bar[modulations[0]].view(-1, 1, 1, 1)
        return (z_t - ab.sqrt() * self.z_0.repeat(len(z_t) // len(self.z_0), 1, 1, 1)) / (1 - ab).sqrt()


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_eq_34_with_the_true_noise_ddim_lands_on_z_0(steps, eta):
    alpha_bar, z_0 = dit.noise_schedule(1000, 1e-4, 0.02), randn(2, 2, 2, 3)
    times = sample.sampling_times(1000, steps)
    out = sample.ddim(Oracle(z_0, alpha_bar), randn(2, 2, 2, 3, seed=3), torch.zeros(4, 1, 5, dtype=torch.float64),
                      torch.ones(4, 1, dtype=torch.bool), alpha_bar, times, 3.0, eta=eta,
                      generators=[torch.Generator().manual_seed(i) for i in range(2)])
    same(out, z_0, 1e-5 if eta else 1e-7)


@pytest.mark.parametrize("steps", [1, 3, 50, 333, 999, 1000, 5000])
def test_sampling_times_start_at_T_fall_and_end_at_0(steps):
    times = sample.sampling_times(1000, steps)
    assert times[0] == 1000 and times[-1] == 0 and len(times) == min(steps, 1000) + 1
    assert all(a > b for a, b in zip(times, times[1:]))


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_eq_34_agrees_with_diffusers(steps, eta):
    schedulers = pytest.importorskip("diffusers", reason="the oracle is optional: pip install diffusers")
    scheduler = schedulers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False,
                                         set_alpha_to_one=True, steps_offset=0, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    alpha_bar = dit.noise_schedule(1000, 1e-4, 0.02)
    times = [int(t) + 1 for t in scheduler.timesteps] + [0]                 # diffusers counts from 0
    theirs = ours = randn(2, 3, 4, 4)
    for i, (t, t_prev) in enumerate(zip(times, times[1:])):
        eps, noise = randn(2, 3, 4, 4, seed=10 + i), randn(2, 3, 4, 4, seed=100 + i)
        theirs = scheduler.step(eps, t - 1, theirs, eta=eta, variance_noise=noise).prev_sample
        # their step below the last time is alpha_bar of "t = -1": set_alpha_to_one makes it 1, our alpha_bar_0
        ours = sample.ddim_step(ours, eps, alpha_bar[t].item(), alpha_bar[t_prev].item(), eta, noise)[0]
        scale = theirs.abs().max().item()
        assert (ours - theirs).abs().max().item() < 1e-5 * max(1, scale)


# ---------------------------------------------------------------------------------------------------------------------
# What a person reads: numbers and names
# ---------------------------------------------------------------------------------------------------------------------


def test_psnr_ssim_and_frechet_distance_against_their_definitions():
    x, x_hat = torch.rand(2, 3, 24, 24) * 2 - 1, torch.rand(2, 3, 24, 24) * 2.4 - 1.2
    a, b = ((p.clamp(-1, 1).numpy().astype(np.float64) + 1) / 2 for p in (x_hat, x))
    same(psvae.psnr(x_hat, x).double(), 10 * np.log10(1 / ((a - b) ** 2).mean((1, 2, 3))), 1e-5)
    assert (psvae.ssim(x, x) - 1).abs().max() < 1e-5
    g = np.exp(-(np.arange(11) - 5.0) ** 2 / (2 * 1.5 ** 2))
    window = np.outer(g, g) / g.sum() ** 2
    values = []
    for c in range(3):
        for i in range(14):
            for j in range(14):
                p, q = a[0, c, i:i + 11, j:j + 11], b[0, c, i:i + 11, j:j + 11]
                m, n = (window * p).sum(), (window * q).sum()
                vp, vq, cov = (window * p * p).sum() - m * m, (window * q * q).sum() - n * n, (window * p * q).sum() - m * n
                values.append((2 * m * n + 1e-4) * (2 * cov + 9e-4) / ((m * m + n * n + 1e-4) * (vp + vq + 9e-4)))
    assert math.isclose(psvae.ssim(x_hat, x)[0].item(), np.mean(values), rel_tol=1e-4)
    rng = np.random.default_rng(0)
    one = rng.normal(size=(500, 4))
    assert abs(psvae.frechet_distance(one, one)) < 1e-6
    assert math.isclose(psvae.frechet_distance(one, one + [1, 2, 0, 0]), 5, rel_tol=1e-6)
    assert math.isclose(psvae.frechet_distance(one, 3 * one - 2 * one.mean(0)), 4 * np.trace(np.cov(one, rowvar=False)), rel_tol=1e-6)


def test_learning_rate_warms_up_and_decays():
    rates = [data.learning_rate(step, 100, 10, 1.0) for step in range(100)]
    same(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0 and all(a > b for a, b in zip(rates[10:], rates[11:])) and 0.0099 < rates[-1] < 0.02
    same(rates[55], 0.01 + 0.99 * 0.5, 1e-9)


def test_every_equation_stands_in_the_code_in_order_and_has_a_test():
    tests = set(re.findall(r"def test_eq_(\d+)_", Path(__file__).read_text(encoding="utf-8")))
    where = {"svae.py": range(4, 12), "psvae.py": range(12, 20), "dit.py": range(20, 33), "sample.py": range(33, 35)}
    for name, numbers in where.items():
        lines = (HERE / name).read_text(encoding="utf-8").splitlines()
        for number in numbers:
            assert str(number) in tests, f"no test for Eq. {number}"
            assert any(re.match(rf"\s*# (DEVIATION.*)?Eq\. {number}:", line) or re.search(rf"# Eq\. {number}(,|:| |$)", line)
                       for line in lines), f"Eq. {number} is not in {name}"
