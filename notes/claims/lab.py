"""The laboratory behind claims.py: small latent spaces, and a DiT on each.

Networks, losses and samplers are the stage files' own; here is only what lets many small runs share
one memory and one table. A picture is 32 x 32 pixels, two by two cells, with one filled object in
its middle, so that a space is trained in minutes. No caption says which red is meant: shades vary,
as detail does that has no name. Every trained part is kept in --out under the digest of its
settings: run again, a row resumes where it stopped, and one row takes over what another has
trained. Every random number of a step comes from (seed, part, step), as in the stages.

    lab = Lab("cpu", "out/lab")
    lab.pixels(space), lab.meaning(space), lab.drawn(space, predict)    # plain dicts
"""

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import dit  # noqa: E402
import psvae  # noqa: E402
from notes.checks.evaluate import frechet_distance, near_edges, psnr  # noqa: E402
from notes.tiny import pretrain_tiny  # noqa: E402
from notes.world import geneval, judge, world  # noqa: E402
from sample import ddim, sampling_times  # noqa: E402

VERSION = 6            # goes up when the same settings would train something else
SAVE_EVERY = 60        # seconds between checkpoints of a part
T, BETAS, GRID, SIDE = 1000, (1e-4, 0.02), 2, 32
SHADES = 7, 10         # how far background and object are from the palette: the judge bears 18, 24


@dataclass(frozen=True)
class Scale:
    """How big; the same for every row of a table."""
    pictures: int               # that train everything
    held_out: int               # that measure everything, and whose captions are the prompts
    widths: tuple[int, ...]     # of the pixel decoder
    stage_1: tuple              # S-VAE: steps, batch, peak learning rate
    stage_2: tuple              # decoders: steps, batch, peak learning rate
    stage_3: tuple              # DiT: steps, batch, peak learning rate
    dit: tuple                  # its width, depth, heads
    prompts: int                # pictures drawn a measurement
    sampler: tuple              # DDIM steps, guidance, eta


SCALES = {
    "cpu": Scale(8000, 400, (64, 32, 16, 16), (600, 64, 2e-3), (2000, 32, 2e-3),
                 (2000, 64, 2e-3), (128, 4, 4), 200, (25, 3.0, 1.0)),
    "gpu": Scale(40_000, 2000, (128, 128, 64, 32), (2000, 256, 2e-3), (20_000, 128, 1e-3),
                 (30_000, 256, 1e-3), (384, 6, 6), 2000, (50, 3.0, 1.0)),
    "quick": Scale(64, 16, (8, 8, 8, 8), (2, 8, 1e-3), (4, 4, 1e-3), (4, 4, 1e-3), (16, 1, 1), 8,
                   (2, 3.0, 1.0)),
}


@dataclass(frozen=True)
class Space:
    """A latent space: everything, beside the scale, that its training depends on."""
    kind: str = "psvae"         # vae, rae, svae, pvae or psvae
    z_dim: int = 24             # channels (rae: those of the features)
    beta: float = 3e-3          # weight of Eq. 11, a sum over channels; for the mean: beta / z_dim
    seed: int = 0
    blind: bool = False         # its frozen encoder has learned that shades do not matter


# --- The pictures ---------------------------------------------------------------------------------

FACTS = {"background": tuple(world.BACKGROUNDS), "colour": tuple(world.COLOURS),
         "shape": world.SHAPES, "size": tuple(world.SIZES)}


def one_object(index: int, split: str) -> tuple[world.Scene, np.ndarray]:
    """Scene `index`, one filled object of the pairs that training shows, and its picture."""
    rng = world.generator("lab", split, index)
    colour, shape = world.pick_look(rng, "train")
    size, at = world.choose(rng, world.SIZES), world.CANVAS / 2
    o = world.Object(shape, colour, size, "filled", at, at)
    scene = world.Scene(world.choose(rng, world.BACKGROUNDS), (o,))
    return scene, draw(scene, rng)


def draw(scene: world.Scene, rng) -> np.ndarray:
    """The scene in some shades: uint8 (32, 32, 3)."""
    o, axis = scene.objects[0], np.arange(SIDE) + 0.5 - SIDE / 2
    palette = world.BACKGROUNDS[scene.background], world.COLOURS[o.colour]
    back, front = (rgb + rng.uniform(-far, far, 3) for rgb, far in zip(palette, SHADES))
    alpha = world.coverage(o.shape, o.size, *np.meshgrid(axis, axis))[..., None]
    return (back + alpha * (front - back)).clip(0, 255).round().astype(np.uint8)


def facts(scene: world.Scene) -> list[int]:
    o = scene.objects[0]
    said = (scene.background, o.colour, o.shape, o.size)
    return [options.index(value) for value, options in zip(said, FACTS.values())]


def prompt(scene: world.Scene) -> str:
    """All that there is to say, in the plainest words."""
    o = world.noun(scene.objects[0], world.LOOK, geneval.Plain())
    return f"{world.with_article(o)} on {world.with_article(scene.background)} background"


def is_read_as(picture: np.ndarray, scene: world.Scene) -> tuple[bool, bool]:
    """Whether the judge reads in a picture just what the scene holds; whether it can read it at
    all. It wants 64 x 64 pixels: around the picture there is its border's colour."""
    border = np.concatenate([picture[[0, -1]].reshape(-1, 3), picture[:, [0, -1]].reshape(-1, 3)])
    canvas = np.empty((world.CANVAS, world.CANVAS, 3), np.uint8)
    canvas[:], at = np.median(border, axis=0), slice(SIDE // 2, SIDE // 2 + SIDE)
    canvas[at, at] = picture
    seen = judge.read(canvas)
    if seen is None or len(seen.objects) != 1:
        return False, seen is not None
    return facts(seen) == facts(scene) and seen.objects[0].style == scene.objects[0].style, True


# --- Encoders and decoders ------------------------------------------------------------------------

class ConvEncoder(nn.Module):
    """The standard VAE's: x (B, 3, H, W) -> mu, log_var (B, H/16, W/16, z_dim); no pretraining."""

    def __init__(self, z_dim: int, widths):
        super().__init__()
        down = [nn.Conv2d(c_in, c_out, 3, 2, 1) for c_in, c_out in zip((3, *widths), widths)]
        blocks = [layer for conv, c in zip(down, widths)
                  for layer in (conv, psvae.ConvBlock(c), psvae.ConvBlock(c))]
        self.body = nn.Sequential(*blocks, psvae.group_norm(widths[-1]), nn.SiLU(),
                                  nn.Conv2d(widths[-1], 2 * z_dim, 1))

    def forward(self, x):
        mu, log_var = self.body(x).permute(0, 2, 3, 1).chunk(2, -1)
        return mu, log_var.clamp(-30, 20)


class Autoencoder(nn.Module):
    """A space's encoder and decoders: encode(x, f) -> mu, log_var. f are the frozen features of x,
    normalised per channel for the RAE. Only vae, pvae and psvae train what encodes."""

    def __init__(self, space: Space, encoder: data.ImageEncoder, f_mean, f_std, widths):
        super().__init__()
        self.kind, self.trains = space.kind, space.kind in ("vae", "pvae", "psvae")
        self.register_buffer("f_mean", f_mean)
        self.register_buffer("f_std", f_std)
        if space.kind == "vae":
            self.encoder = ConvEncoder(space.z_dim, widths[::-1])
        if space.kind in ("pvae", "psvae"):
            self.encoder = copy.deepcopy(encoder).requires_grad_(True)
            self.encoder.network.embeddings.mask_token.requires_grad_(False)
        if space.kind not in ("vae", "rae"):
            self.projector = psvae.Projector(encoder.dim, space.z_dim)
            self.semantic_decoder = psvae.SemanticDecoder(encoder.dim, space.z_dim)
        self.pixel_decoder = psvae.PixelDecoder(space.z_dim, widths)

    def encode(self, x, f):
        if self.kind == "rae":
            mu = (f - self.f_mean) / self.f_std
            return mu, torch.full_like(mu, -30.0)
        if self.kind == "vae":
            return self.encoder(x)
        if self.kind == "svae":
            with torch.no_grad():
                return self.projector(f)
        return self.projector(self.encoder(x))

    def to_features(self, z):
        """The frozen features that latents stand for, or None: pixels alone do not keep them."""
        if self.kind == "rae":
            return z * self.f_std + self.f_mean
        return self.semantic_decoder(z) if self.kind in ("svae", "psvae") else None


# --- Training, kept on disk -----------------------------------------------------------------------

def clock(device) -> float:
    """Seconds of work: of the processor on a CPU, whatever else runs beside it; else of the
    wall."""
    return time.process_time() if device.type == "cpu" else time.monotonic()


@torch.enable_grad()           # measurements, which need no gradient, may ask for the training
def fit(path: Path, model: nn.Module, steps, peak, loss_of, device, decay=0.01, look=None,
        say="") -> dict:
    """Trains in place, from where `path` stops; loss_of(step) is the loss of its batch. Keeps
    everything in `path`, every SAVE_EVERY seconds and at the end. Returns the "seconds" it took and
    its "curve": what look() gave after each quarter of the steps."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.99), weight_decay=decay,
                                  fused=True)
    kept = {"step": 0, "seconds": 0.0, "curve": []}
    if path.exists():
        kept = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(kept["model"])
        if kept["step"] < steps:
            optimizer.load_state_dict(kept["optimizer"])
    begin, saved = clock(device) - kept["seconds"], time.monotonic()
    for step in range(kept["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = data.learning_rate(step, steps, min(50, steps // 10), peak)
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = kept["step"] = step + 1
        if look and done % (steps // 4) == 0:
            kept["curve"].append(look())
        if done == steps or time.monotonic() - saved > SAVE_EVERY:
            if not torch.isfinite(loss):
                raise data.UserError(f"{path.name}: the loss is {loss.item()} at step {done}")
            kept |= {"seconds": clock(device) - begin, "model": model.state_dict(),
                     "optimizer": optimizer.state_dict() if done < steps else {}}
            with data.atomic(path) as partial:
                torch.save(kept, partial)
            saved = time.monotonic()
            print(f"  {say} step {done:,} of {steps:,}, loss {loss.item():.4f}, "
                  f"{kept['seconds']:.0f} s", file=sys.stderr, flush=True)
    return {name: kept[name] for name in ("seconds", "curve")}


class Pictures:
    """Pictures with their frozen features and texts: `train`, then `test`."""

    def __init__(self, lab: "Lab"):
        n, m = lab.scale.pictures, lab.scale.held_out
        made = ([one_object(i, "train") for i in range(n)]
                + [one_object(i, "held out") for i in range(m)])
        self.scenes = [scene for scene, _ in made]
        self.train, self.test = slice(0, n), slice(n, n + m)
        self.facts = torch.tensor([facts(scene) for scene in self.scenes])
        captions = []                                   # two complete ones, two loose ones
        for i, scene in enumerate(self.scenes):
            rng = world.generator("lab caption", i)
            captions.append([world.caption(scene, rng, complete) for complete in world.CAPTIONS])
        asked = [prompt(scene) for scene in self.scenes]
        texts = ["", *sorted({*asked, *(text for four in captions for text in four)})]
        place = {text: i for i, text in enumerate(texts)}
        number = lambda some: torch.tensor([place[text] for text in some], device=lab.device)
        self.captions = torch.stack([number(four) for four in zip(*captions)], 1)       # (N, 4)
        self.asked = number(asked)
        path = lab.path("world")
        if not path.exists():
            pictures = np.stack([picture for _, picture in made])
            pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
            encoder = data.load_text_encoder(data.TINY_TEXT_ENCODER, 64, lab.device)
            c, mask = encoder(texts)
            kept = {"pictures": pictures, "c": c.half().cpu(), "mask": mask.cpu(),
                    "f": lab.features(data.to_float(pictures, lab.device)).cpu()}
            with data.atomic(path) as partial:
                torch.save(kept, partial)
        kept = torch.load(path, weights_only=True, map_location=lab.device)
        self.pictures, self.f = kept["pictures"], kept["f"]
        self.c, self.mask = kept["c"], kept["mask"]

    def x(self, rows) -> torch.Tensor:
        return data.to_float(self.pictures[rows], self.pictures.device)


class Lab:
    """The pictures, the frozen encoder, and everything trained or measured so far."""

    def __init__(self, scale: str, out: str, device: str = "auto"):
        self.scale, self.out, self.device = SCALES[scale], Path(out), data.pick_device(device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        encoder = data.load_image_encoder(data.TINY_IMAGE_ENCODER)
        self.encoder = encoder.to(self.device).requires_grad_(False)
        self.made_for = [VERSION, world.VERSION, asdict(self.scale), data.fingerprint(encoder)]
        self.alpha_bar = dit.noise_schedule(T, *BETAS).to(self.device)
        self.pictures, self.models = Pictures(self), {}
        self.encoders = {False: (self.encoder, self.pictures.f)}

    @torch.no_grad()
    def features(self, x, encoder=None) -> torch.Tensor:
        return torch.cat([(encoder or self.encoder)(part) for part in x.split(250)])

    def frozen(self, blind: bool):
        """The frozen encoder and its features of all pictures. The blind one has learned, as
        DINOv2 does of jittered colours, that a scene in two shades is one thing (Eq. 2)."""
        if blind not in self.encoders:
            encoder, pictures = copy.deepcopy(self.encoder).requires_grad_(True), self.pictures
            encoder.network.embeddings.mask_token.requires_grad_(False)
            steps, batch, _ = self.scale.stage_1

            def loss_of(step):
                rows = self.rows(0, "lab blind", step, batch)
                again = np.stack([draw(pictures.scenes[i], world.generator("lab again", step, i))
                                  for i in rows.tolist()])
                again = torch.from_numpy(again).permute(0, 3, 1, 2)
                f, f_plus = (encoder(x).flatten(1) for x in (
                    pictures.x(rows), data.to_float(again, self.device)))
                known = pictures.facts[rows]
                same = (known[:, None] == known).all(-1).to(self.device)
                return pretrain_tiny.contrastive_loss(f, f_plus, 0.1, same)

            fit(self.path("blind"), encoder, steps, 3e-4, loss_of, self.device, say="blind")
            encoder.requires_grad_(False)
            f = self.features(pictures.x(slice(None)), encoder)
            self.encoders[blind] = encoder, f
        return self.encoders[blind]

    def path(self, what: str, *settings, end=".pt") -> Path:
        key = [*self.made_for,
               *(asdict(part) if isinstance(part, Space) else part for part in settings)]
        return self.out / f"{what}-{data.digest_of(key)[:12]}{end}"

    def kept(self, what: str, compute, *settings) -> dict:
        """A measurement: read if it was made before, else made and written."""
        path = self.path(what, *settings, end=".json")
        if not path.exists():
            result = compute()
            data.write_json(path, result)
        return data.read_json(path)

    def rows(self, seed, stage, step, batch):
        return torch.from_numpy(data.order(seed, stage, self.scale.pictures, batch, step))

    def randn(self, seed, stage, step, what, shape):
        return torch.randn(shape, generator=data.generator(seed, stage, step, what)).to(self.device)

    # --- Stages 1 and 2

    def stage_1(self, space: Space, model: Autoencoder):
        """Projector and semantic decoder on frozen features (svae.py's loss), into `model`."""
        steps, batch, peak = self.scale.stage_1
        parts = nn.ModuleList([model.projector, model.semantic_decoder])
        _, frozen = self.frozen(space.blind)

        def loss_of(step):
            f = frozen[self.rows(space.seed, "lab 1", step, batch)]
            mu, log_var = model.projector(f)
            eps = self.randn(space.seed, "lab 1", step, "eps", mu.shape)
            z = psvae.reparameterize(mu, log_var, eps)
            f_hat = model.semantic_decoder(z)
            # Eq. 8: L_S-VAE = L_semantic + beta * L_KL
            return psvae.semantic_loss(f_hat, f) + space.beta * psvae.kl_divergence(mu, log_var)

        first = replace(space, kind="svae")         # one stage 1 for all kinds that begin with it
        fit(self.path("stage1", first), parts, steps, peak, loss_of, self.device,
            say=f"stage 1 for {space.kind} seed {space.seed}")

    def autoencoder(self, space: Space) -> Autoencoder:
        """The trained encoder and decoders of a space, and how the PSNR of held-out pictures grew:
        `.fit`."""
        if space in self.models:
            return self.models[space]
        steps, batch, peak = self.scale.stage_2
        if space.kind == "vae":             # whose encoder begins from nothing
            steps = steps * 5 // 2
        torch.manual_seed(space.seed)
        pictures, (encoder, frozen) = self.pictures, self.frozen(space.blind)
        train = frozen[pictures.train].double().flatten(0, 2)
        model = Autoencoder(space, encoder, train.mean(0).float(), train.std(0).float(),
                            self.scale.widths).to(self.device)
        path = self.path("stage2", space)
        if not path.exists() and hasattr(model, "projector"):
            self.stage_1(space, model)
        model.pixel_decoder.to(memory_format=torch.channels_last)
        beta = space.beta if model.trains else 0.0
        self.models[space] = model      # what measures it on the way must not train it again

        def loss_of(step):
            rows = self.rows(space.seed, "lab 2", step, batch)
            x, f = pictures.x(rows), frozen[rows]
            mu, log_var = model.encode(x, f)
            eps = self.randn(space.seed, "lab 2", step, "eps", mu.shape)
            z = psvae.reparameterize(mu, log_var, eps)
            # Eq. 15 with this row's weights; beta grows over the first eighth
            loss = psvae.pixel_loss(model.pixel_decoder(z), x)
            loss = loss + min(1, 8 * (step + 1) / steps) * beta * psvae.kl_divergence(mu, log_var)
            if space.kind == "psvae":
                loss = loss + psvae.semantic_loss(model.semantic_decoder(z), f)
            return loss

        model.fit = fit(path, model, steps, peak, loss_of, self.device,
                        look=lambda: self.errors(space)[0], say=f"stage 2 {self.name(space)}")
        return model.eval()

    @staticmethod
    def name(space: Space) -> str:
        return f"{space.kind}, {space.z_dim} channels, beta {space.beta:g}, seed {space.seed}"

    @torch.no_grad()
    def posterior(self, space: Space, rows: slice):
        """mu, log_var (N, h, w, z_dim) of pictures."""
        model, pictures = self.autoencoder(space), self.pictures
        x, f = pictures.x(rows), self.frozen(space.blind)[1][rows]
        parts = [model.encode(*pair) for pair in zip(x.split(250), f.split(250))]
        return [torch.cat(part) for part in zip(*parts)]

    @torch.no_grad()
    def decode(self, space: Space, z) -> torch.Tensor:
        """Pictures in [-1, 1], clamped and rounded to bytes as a file would hold them."""
        model = self.autoencoder(space)
        x = torch.cat([model.pixel_decoder(part) for part in z.split(125)]).clamp(-1, 1)
        return ((x + 1) * 127.5).round() / 127.5 - 1

    @torch.no_grad()
    def errors(self, space: Space) -> list[float]:
        """PSNR of held-out pictures from mu: everywhere, near edges, elsewhere."""
        x = self.pictures.x(self.pictures.test)
        x_hat = self.decode(space, self.posterior(space, self.pictures.test)[0])
        edge = near_edges(x)
        return [psnr(x_hat, x, where).nanmean().item() for where in (None, edge, ~edge)]

    # --- Stage 3

    def dit(self, space: Space, predict: str):
        """generate(count) -> latents for the first held-out prompts, by a DiT on the latents of a
        space; and how the share of pictures grew that the judge finds right, as fit() has it."""
        steps, batch, peak = self.scale.stage_3
        pictures = self.pictures
        mu, log_var = self.posterior(space, slice(None))
        flat = mu[pictures.train].double().flatten(0, 2)
        sigma2 = log_var[pictures.train].double().exp().flatten(0, 2)
        mean, std = flat.mean(0).float(), (flat.var(0) + sigma2.mean(0)).sqrt().float()
        torch.manual_seed(space.seed)
        model = dit.DiT(GRID, mu.shape[-1], pictures.c.shape[-1], *self.scale.dit, whiten_text=True)
        tokens = pictures.c[pictures.mask].cpu().numpy()
        texts = SimpleNamespace(blocks=[tokens], ends=[[len(tokens)]])
        model.text_shift[:], model.text_map[:] = data.Texts.whitening(texts)
        model.to(self.device)

        def loss_of(step):
            g = data.generator(space.seed, "lab 3", step, "rows")
            rows = self.rows(space.seed, "lab 3", step, batch)
            text = pictures.captions[rows, torch.randint(4, (batch,), generator=g)]
            noise = lambda what: self.randn(space.seed, "lab 3", step, what, (batch, *mu.shape[1:]))
            z_0 = (psvae.reparameterize(mu[rows], log_var[rows], noise("z_0")) - mean) / std
            text = torch.where((torch.rand(batch, generator=g) < 0.1).to(self.device), 0, text)
            c, mask = pictures.c[text].float(), pictures.mask[text]
            told = lambda z, t: model(z, t, c, mask)
            return objective_loss(predict, told, z_0, noise("eps"), g, self.alpha_bar)

        @torch.no_grad()
        def generate(count: int) -> torch.Tensor:
            text = pictures.asked[pictures.test.start:pictures.test.start + count]
            z_T = self.randn(space.seed, "lab 3", 0, "z_T", (count, GRID, GRID, len(mean)))
            both = torch.cat([text, torch.zeros_like(text)])
            c, mask = pictures.c[both].float(), pictures.mask[both]
            steps, guidance, eta = self.scale.sampler
            if predict == "flow":
                return flow_sample(model, z_T, c, mask, steps, guidance) * std + mean
            generators = [data.generator(space.seed, "lab 3", i, "ddim") for i in range(count)]
            z_0 = ddim(model, z_T, c, mask, self.alpha_bar, sampling_times(T, steps), guidance,
                       eta=eta, generators=generators,
                       predict="eps" if predict == "eps" else "v")
            return z_0 * std + mean

        def right() -> float:
            x = self.decode(space, generate(self.scale.prompts))
            return self.judged(x)[:, 0].mean().item()

        found = fit(self.path("stage3", space, predict), model, steps, peak, loss_of, self.device,
                    decay=0.0, look=right, say=f"stage 3 {predict}, {self.name(space)}")
        return generate, found

    def judged(self, x) -> np.ndarray:
        """Of pictures for the first held-out prompts: is each right, and can it be read."""
        scenes = self.pictures.scenes[self.pictures.test]
        return np.array([is_read_as(*pair) for pair in zip(data.to_uint8(x), scenes)])

    # --- Measures, each a plain dict and kept on disk

    def pixels(self, space: Space) -> dict:
        """What comes back from mu of held-out pictures."""
        def compute():
            found = self.autoencoder(space).fit
            return dict(zip(("psnr", "edge", "elsewhere"), self.errors(space))) | found
        return self.kept("pixels", compute, space)

    def meaning(self, space: Space) -> dict:
        """What a linear map reads out of mu, what of the features comes back, and the rate."""
        def compute():
            pictures = self.pictures
            mu, log_var = self.posterior(space, slice(None))
            flat, train, test = mu.flatten(1).double().cpu(), pictures.train, pictures.test
            answers = lambda rows: {name: pictures.facts[rows, i].tolist()
                                    for i, name in enumerate(FACTS)}
            result = pretrain_tiny.linear_read_out(flat[train], answers(train),
                                                   flat[test], answers(test))
            model, f = self.autoencoder(space), self.frozen(space.blind)[1][test]
            with torch.no_grad():
                f_hat = model.to_features(mu[test])
            if f_hat is not None:
                result["features"] = (1 - (f_hat - f).square().sum()
                                      / (f - model.f_mean).square().sum()).item()
            if space.kind != "rae":                     # whose latents are points
                result["rate"] = psvae.kl_divergence(mu[test], log_var[test]).item()
                result["sigma"] = (log_var[test] / 2).exp().mean().item()
            return result
        return self.kept("meaning", compute, space)

    def drawn(self, space: Space, predict: str) -> dict:
        """Scores of what the DiT draws; "mu": of true pictures through the same decoder.

        right: the judge reads just what was asked for; unreadable: it reads nothing; fd: Fréchet
        distance between frozen features (mean over the cells) and those of training pictures;
        beside: distance of the picture's features to the nearest training picture's, less that of
        true held-out pictures, as a share of the features' spread; off: the same of the features
        that the latents stand for, before there is a picture.
        """
        def compute():
            pictures, count = self.pictures, self.scale.prompts
            first = pictures.test.start
            frozen = self.frozen(space.blind)[1]
            pooled = lambda f: f.mean((1, 2)).cpu().numpy()

            def away(f, of):
                """Beyond what true pictures have, by features `of` all pictures."""
                known = of[pictures.train].flatten(1)
                spread = (known - known.mean(0)).norm(dim=1).mean()
                near = lambda f: torch.cdist(f.flatten(1), known).min(1).values.mean()
                return ((near(f) - near(of[first:first + count])) / spread).item()

            def score(z):
                x = self.decode(space, z)
                f, read = self.features(x), self.judged(x)
                with torch.no_grad():
                    own = self.autoencoder(space).to_features(z)
                off = {} if own is None else {"off": away(own, frozen)}
                return {"right": float(read[:, 0].mean()),
                        "unreadable": float(1 - read[:, 1].mean()),
                        "fd": frechet_distance(pooled(f), pooled(pictures.f[pictures.train])),
                        "beside": away(f, pictures.f), **off, "each": read[:, 0].tolist()}

            generate, found = self.dit(space, predict)
            mu, _ = self.posterior(space, slice(first, first + count))
            return {**found, "mu": score(mu), **score(generate(count))}
        return self.kept("drawn", compute, space, predict)


# --- The objectives of stage 3, and the paper's sampler -------------------------------------------

def objective_loss(predict: str, model, z_0, eps, g, alpha_bar):
    """The guide's loss with eps or v (Eq. 32); "middle": v with the tiny preset's t; "flow": the
    paper's rectified flow, z_t = (1 - t) z_0 + t eps, t in 0 .. 1, where the network, told T t,
    predicts eps - z_0."""
    if predict == "flow":
        t = torch.sigmoid(torch.randn(len(z_0), generator=g))
        t = shifted(t, z_0.shape[-1]).to(z_0.device)
        at = t.view(-1, 1, 1, 1)
        return F.mse_loss(model((1 - at) * z_0 + at * eps, T * t), eps - z_0)
    t = torch.randint(1, T + 1, (len(z_0),), generator=g)
    if predict == "middle":
        u = torch.sigmoid(0.2 + 0.8 * torch.randn(len(z_0), generator=g))
        t = (1 + T * u).long().clamp(max=T)
    t = t.to(z_0.device)
    target = eps if predict == "eps" else dit.v_of(z_0, t, eps, alpha_bar)
    # Eq. 32: L_DiT = E || eps - eps_theta(z_t, t, c) ||^2, z_t by Eq. 22
    return dit.dit_loss(target, model(dit.add_noise(z_0, t, eps, alpha_bar), t))


def shifted(t, channels: int):
    """Flow's times: more numbers need more noise. sqrt(C P^2 / 16), with patches of P = 1."""
    shift = math.sqrt(channels / 16)
    return shift * t / (1 + (shift - 1) * t)


def flow_sample(model, z_T, c, mask, steps: int, guidance: float):
    """Euler's steps from noise to z_0; c and mask hold the texts, then the null texts."""
    times = shifted(torch.linspace(1, 0, steps + 1), z_T.shape[-1]).tolist()
    z = z_T
    for t, t_next in zip(times, times[1:]):
        at = torch.full((2 * len(z),), T * t, device=z.device)
        v_c, v_null = model(torch.cat([z, z]), at, c, mask).chunk(2)
        z = z + (t_next - t) * (v_null + guidance * (v_c - v_null))
    return z
