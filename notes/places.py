"""Teaches a DiT of the built-in world to read where things are to be: 800 steps at high noise, 7 minutes.

    python notes/places.py [--out out] [--steps 800]       then go on:  python dit.py --steps …

The model that shipped before read no place after 28,340 steps: "above" stood in a sixth of the captions,
said something at the noisiest t alone, and in the mixture of everything nothing came of it. With batches of
which most rows name a place, t from 400 up, and weights 1 / alpha_bar_t, it came within 300 steps, and it
stayed when training went on as before (notes/LOG.md, "What the model does not read"; swaps.py measures it).
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


@data.program
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="folder with latents/, text/ and dit.pt")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--share", type=float, default=0.7, help="of the rows of a batch that name a place")
    parser.add_argument("--t-from", type=int, default=400, help="t is uniform from here to T")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    out, device = Path(args.out), data.pick_device("auto")
    saved, meta = data.load(out / "dit.pt", "dit", before="python dit.py"), dit.read_meta(out)
    cfg, rows = data.configure(dit.Config, dit.PRESETS, {}, saved=saved["config"]), dit.read_rows(out, meta)
    captions = ["", *sorted({row["text"] for row in rows} - {""})]
    if data.read_json(out / "text/meta.json").get("captions") != data.digest_of(captions):
        raise data.UserError(f"{out}/text does not fit {out}/latents; python dit.py --out {out} writes it.")
    texts = dit.Texts(out / "text", captions)
    latents = dit.Latents(out / "latents", meta, rows, texts)
    kinds = [some for some in (latents.rows(False, False), latents.rows(False, True)) if some]
    placed = [[row for row in some if PLACES.search(rows[row]["text"])] or some for some in kinds]

    model = dit.build(saved["config"], saved["shape"]).to(device).train()
    data.load_weights(model, saved["ema"], out / "dit.pt")
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    alpha_bar = model.alpha_bar
    mean, variance = (torch.tensor(meta[name], device=device) for name in ("mean", "variance"))
    begin = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 100)
        kind, g = (step % 4 == 3) % len(kinds), data.generator(args.seed, "places", step, "rows")
        pick = lambda some: some[torch.randint(len(some), (), generator=g).item()]
        keys = [(pick(placed[kind] if torch.rand((), generator=g) < args.share else kinds[kind]),
                 bool(torch.rand((), generator=g) < cfg.drop_text), False) for _ in range(cfg.batch)]
        mu, log_var, c, mask, source = (part if part is None else part.to(device)
                                        for part in latents.collate([latents[key] for key in keys]))
        z_0 = dit.normalise(dit.sample_z_0(mu, log_var, torch.randn(mu.shape, generator=g).to(device)),
                            mean, variance)
        source = source if source is None else dit.normalise(source, mean, variance)
        t = torch.randint(min(args.t_from, cfg.T), cfg.T + 1, (cfg.batch,), generator=g).to(device)
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
