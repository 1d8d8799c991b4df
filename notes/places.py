"""Teaches a DiT of the built-in world to read where things are to be: 800 steps at high noise, 7 minutes.

    python notes/places.py [--out out] [--steps 800]       then go on:  python dit.py --steps …

The model that shipped before read no place after 28,340 steps: "above" stood in a sixth of the captions,
said something at the noisiest t alone, and in the mixture of everything nothing came of it. With batches of
which most rows name a place, t from 400 up, and weights 1 / alpha_bar_t, it came between step 300 and 500,
and it stayed when training went on as before (notes/LOG.md, "What the model does not read"; swaps.py measures
it). Give it the 800: at 300 there is no trace yet but in edits that move something.
Three batches of four are captions and one is edits, if there are any. Goes on with out/dit.pt and writes it
back at the end, its step as it was; a kill before that changes nothing.
"""

import argparse
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                                                                       # noqa: E402
import dit                                                                                        # noqa: E402

PLACES = re.compile(r"\b(above|below|over|under|left|right|top|bottom)\b")
SHARE = 0.7              # of the rows that certainly name a place; the others are any rows
T_FROM = 400             # t is uniform from here to T
LEARNING_RATE = 1e-3     # after 100 steps of warm-up


def keys_of_step(step: int, cfg: dit.Config, kinds: list[list[int]],
                 placed: list[list[int]]) -> list[tuple[int, bool, bool]]:
    """A batch as keys of dit.Latents. kinds: rows of captions and, if there are any, of edits; placed: those
    of each that name a place."""
    kind, g = (step % 4 == 3) % len(kinds), data.generator(cfg.seed, "places", step, "rows")
    pick = lambda rows: rows[torch.randint(len(rows), (), generator=g).item()]
    chance = lambda p: torch.rand((), generator=g).item() < p
    return [(pick((placed if chance(SHARE) else kinds)[kind]), chance(cfg.drop_text), False)
            for _ in range(cfg.batch)]


@data.program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder with latents/, text/ and dit.pt")
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args(argv)

    out, device = Path(args.out), data.pick_device("auto")
    model, saved = dit.load_dit(out / "dit.pt", device)                     # the averaged weights
    cfg, meta = dit.Config(**saved["config"]), dit.read_meta(out)
    rows = dit.read_rows(out, meta)
    captions = ["", *sorted({row["text"] for row in rows} - {""})]
    text = data.read_json(out / "text/meta.json")
    if (saved["psvae_fingerprint"], saved["text_fingerprint"], data.digest_of(captions)) != (
            meta["fingerprint"], text.get("fingerprint"), text.get("captions")):
        raise data.UserError(f"{out}/dit.pt, latents and text do not fit each other; "
                             f"python dit.py --out {out} says which.")
    latents = dit.Latents(out / "latents", meta, rows, dit.Texts(out / "text", captions))
    kinds = [some for some in (latents.rows(False, False), latents.rows(False, True)) if some]
    placed = [[row for row in some if PLACES.search(rows[row]["text"])] or some for some in kinds]

    model.requires_grad_(True).train()
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    alpha_bar = model.alpha_bar
    mean, variance = (torch.tensor(meta[name], device=device) for name in ("mean", "variance"))
    begin = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 100)
        keys, g = keys_of_step(step, cfg, kinds, placed), data.generator(cfg.seed, "places", step, "noise")
        mu, log_var, c, mask, source = (part if part is None else part.to(device)
                                        for part in latents.collate([latents[key] for key in keys]))
        z_0 = dit.normalise(dit.sample_z_0(mu, log_var, torch.randn(mu.shape, generator=g).to(device)),
                            mean, variance)
        source = source if source is None else dit.normalise(source, mean, variance)
        t = torch.randint(min(T_FROM, cfg.T), cfg.T + 1, (cfg.batch,), generator=g).to(device)
        eps = torch.randn(z_0.shape, generator=g).to(device)
        loss = dit.dit_loss(eps, model(dit.add_noise(z_0, t, eps, alpha_bar), t, c, mask, source),
                            1 / alpha_bar[t].float())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 0.01)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            print(f"places: step {step + 1} loss {loss.item():.3f} {time.monotonic() - begin:.0f} s",
                  flush=True)
    parts = {key: saved[key] for key in saved if key not in ("format", "stage", "config", "versions")}
    data.save(out / "dit.pt", "dit", cfg, **parts | {
        "model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()})
    print(f"wrote {out / 'dit.pt'}. Next: python dit.py --out {out} --steps {saved['step'] + 9000}")


if __name__ == "__main__":
    sys.exit(main())
