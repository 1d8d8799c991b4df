"""Learns the two tiny encoders that ship with the repository, with the guide's contrastive loss (Eq. 2).

DINOv2 and T5 are pretrained elsewhere, on much. The tiny preset needs encoders of the same architectures that
know the built-in world: a discriminative image encoder (DINOv2's, patch 14, 56 px) and a text encoder (T5's),
trained together so that three pairs meet: a picture and its caption; an instruction and the pair (source,
target) that it turns one into the other; a place in a picture and the words for the object that is there
("a small outlined red star"). Without the third pair the image encoder stays blind to shape: colours, number
and background answer most captions, and the loss is content. It is never asked to keep pixels: the guide's
Problem 2 is to be had here as well.

Meeting pictures leaves a text encoder a bag of words: whose colour is whose does not matter to it. So it
reads as well, at the same time and then alone: linear maps of each noun's embedding name what the text says
of that noun.

    python notes/tiny/pretrain_tiny.py [--steps 350] [--read-steps 600]
        writes notes/tiny/{image,text}_encoder

Both are saved in transformers' own format, in half precision, and loaded by the same code as the big ones.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data
from notes.world import world

D_TEXT, D_SHARED, MAX_TOKENS = 128, 128, 64
READING = 0.3   # weight of reading beside the contrastive losses


def contrastive_loss(f: torch.Tensor, f_plus: torch.Tensor, tau: torch.Tensor,
                     same: torch.Tensor) -> torch.Tensor:
    """Eq. 2 with sim = cosine, averaged over i: rows i of f and f_plus (B, d) belong together.

    same (B, B) is True where row k is as good a partner for i as i's own (an equal caption):
    it is no negative.
    """
    sim = F.normalize(f, dim=-1) @ F.normalize(f_plus, dim=-1).T
    sim = sim.masked_fill(same.clone().fill_diagonal_(False), -1e4)
    # Eq. 2: L = -log( exp(sim(f_i, f_j+) / tau) / sum_k exp(sim(f_i, f_k) / tau) )
    return -F.log_softmax(sim / tau, dim=1).diagonal().mean()


def build_tokenizer(texts: list[str], size: int):
    """A byte-level BPE of lower-cased text:
    every text of any language is some sequence of its tokens; no <unk>."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>",
                                   model_max_length=10_000, clean_up_tokenization_spaces=False)


def at_objects(tokens: torch.Tensor, objects) -> torch.Tensor:
    """The patches around the centre of each object, interpolated bilinearly.

    tokens (B, 1 + N, d), CLS first; objects: a list for each of the B pictures -> (M, d), one for each of the
    M objects.
    """
    side = round((tokens.shape[1] - 1) ** 0.5)
    picture = [k for k, found in enumerate(objects) for _ in found]
    centre = [(o.x, o.y) for found in objects for o in found]
    centre = torch.tensor(centre, device=tokens.device).view(-1, 2)                    # there may be none
    grid = tokens[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)[picture]       # (M, d, side, side)
    at = (centre / (world.CANVAS / 2) - 1)[:, None, None]                              # x, y in [-1, 1]
    return F.grid_sample(grid, at, align_corners=False).flatten(1)


class Pair(nn.Module):
    """Both encoders and what only pretraining needs: projections into a shared space and the temperature."""

    def __init__(self, image_encoder: data.ImageEncoder, text_network):
        super().__init__()
        self.image_encoder, self.text_network = image_encoder, text_network
        self.image = nn.Linear(2 * image_encoder.dim, D_SHARED)
        self.change = nn.Sequential(nn.Linear(2 * D_SHARED, D_SHARED), nn.GELU(),
                                    nn.Linear(D_SHARED, D_SHARED))
        self.place = nn.Linear(image_encoder.dim, D_SHARED)
        self.text, self.instruction, self.noun = (nn.Linear(D_TEXT, D_SHARED) for _ in range(3))
        self.log_tau = nn.Parameter(torch.tensor(0.07).log())

    def picture(self, tokens):
        """CLS and the mean of the patches, (B, 1 + N, d) -> (B, D_SHARED). With CLS alone, empty patches
        become its notepad: six times as much of their variance then comes from elsewhere (LOG.md)."""
        return self.image(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], -1))

    def embed(self, encoder, texts):
        """Texts (B) -> h (B, L, D_TEXT), the mean over each text's tokens (B, D_TEXT), and the tokens."""
        tokens = encoder.tokenize(texts).to(self.log_tau.device)
        h = self.text_network(input_ids=tokens["input_ids"],
                              attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"][..., None].float()
        return h, (h * mask).sum(1) / mask.sum(1), tokens


def objects_of(folder: data.Folder) -> list[list[world.Object]]:
    """The objects of each picture of the built-in world, as its metadata tells them (of those
    without words: none)."""
    with open(Path(folder.root) / "metadata.jsonl", encoding="utf-8") as lines:
        scenes = {row["file_name"]: row["scene"]["objects"] for row in map(json.loads, lines)
                  if "scene" in row}
    return [[world.Object(**o) for o in scenes.get(name, [])] for name in folder.images]


def linear_read_out(f, known: dict, f_test, asked: dict) -> dict[str, float]:
    """How often a linear map of f (N, d) tells each of `known` {name: N values}: ridge regression on
    one-hot answers, measured on f_test and `asked`."""
    f, f_test = (F.pad(part.double(), (0, 1), value=1.0) for part in (f, f_test))
    shares = {}
    for name, values in known.items():
        kinds = sorted(set(values))
        answer = F.one_hot(torch.tensor([kinds.index(value) for value in values])).double()
        weights = torch.linalg.solve(f.T @ f + 1e-2 * torch.eye(f.shape[1]), f.T @ answer)
        said = (f_test @ weights).argmax(1).tolist()
        shares[name] = float(np.mean([kinds[k] == value for k, value in zip(said, asked[name])]))
    return shares


@torch.no_grad()
def read_out(image_encoder, train, test, count: int = 2000) -> dict[str, float]:
    """How often a linear map of the patches at an object's centre tells its shape, colour, size and style.

    train and test are (pictures, objects of each); the map is fitted to the first `count` pictures of one and
    measured on those of the other. Chance: 1/6, 1/8, 1/2, 1/2.
    """
    sides = []
    for pictures, objects in (train, test):
        parts = []
        for some in torch.arange(min(count, len(pictures))).split(100):
            x = data.to_float(torch.stack([pictures[(i, None)][0] for i in some.tolist()]),
                              image_encoder.mean.device)
            parts.append(at_objects(image_encoder.tokens(x), [objects[i] for i in some]).cpu())
        there = [o for found in objects[:count] for o in found]
        sides += [torch.cat(parts), {name: [getattr(o, name) for o in there] for name in world.LOOK}]
    return linear_read_out(*sides)


def same_text(texts):
    _, number = np.unique(texts, return_inverse=True)
    return torch.from_numpy(number[:, None] == number[None])


@torch.no_grad()
def retrieval(pair: Pair, encoder: data.TextEncoder, pictures: data.Pictures, captions) -> float:
    """How often a held-out picture finds its own caption, a complete one, among 500."""
    rows = list({image: (image, text, -1) for image, text, _ in captions[::-1]}.values())[:500]
    x = torch.stack([pictures[(image, None)][0] for image, _, _ in rows])
    texts = [text for _, text, _ in rows]
    device = pair.log_tau.device
    a = F.normalize(pair.picture(pair.image_encoder.tokens(data.to_float(x, device))), dim=-1)
    b = F.normalize(pair.text(pair.embed(encoder, texts)[1]), dim=-1)
    best = (a @ b.T).argmax(1)
    return float(np.mean([texts[i] == texts[j] for i, j in enumerate(best.tolist())]))


def train(folder, held_out, args, device) -> tuple[data.ImageEncoder, data.TextEncoder]:
    """Both encoders from nothing, by Eq. 2 on the three pairs, and by reading."""
    from transformers import Dinov2Config, Dinov2Model, T5Config, T5EncoderModel
    told = [row for row in folder.rows if row[1]]      # pictures without words teach it nothing
    captions, edits = ([row for row in told if (row[2] >= 0) == edit] for edit in (False, True))
    objects = objects_of(folder)
    tokenizer = build_tokenizer([row[1] for row in told[:30_000]], size=1024)
    torch.manual_seed(0)
    image_network = Dinov2Model(Dinov2Config(hidden_size=128, num_hidden_layers=6,
                                             num_attention_heads=4, image_size=56, patch_size=14))
    text_network = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=D_TEXT, d_ff=256, d_kv=32,
                                           num_heads=4, num_layers=3, feed_forward_proj="gated-gelu",
                                           dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
                                           decoder_start_token_id=0))
    encoder = data.TextEncoder(text_network, tokenizer, MAX_TOKENS)
    pair = Pair(data.ImageEncoder(image_network), text_network).to(device)
    text_network.requires_grad_(True)
    reader = Reader([row[1] for row in told[:30_000]]).to(device)
    # Muon (see data.py) reaches in 300 steps what AdamW alone needs 700 for
    matrices = [m.weight for network in (image_network, text_network) for m in network.modules()
                if isinstance(m, nn.Linear)]
    momenta, other = [torch.zeros_like(p) for p in matrices], {id(p) for p in (pair.log_tau, *matrices)}
    weights = [p for p in (*pair.parameters(), *reader.parameters()) if p.requires_grad and id(p) not in other]
    optimizer = torch.optim.AdamW([{"params": weights, "scale": 1}, {"params": [pair.log_tau], "scale": 10}],
                                  betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    pictures, held_pictures = data.Pictures(folder, 64), data.Pictures(held_out, 64)
    unseen = [row[1] for row in held_out.rows[::max(1, len(held_out.rows) // 1000)]]
    begin = time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * data.learning_rate(step, args.steps, 100, 1.5e-3)
        rows = [captions[i] for i in data.order(0, "pretrain", len(captions), 128, step)]
        changes = [edits[i] for i in data.order(0, "pretrain edits", len(edits), 42, step)]
        wanted = [row[0] for row in rows] + [row[2] for row in changes] + [row[0] for row in changes]
        x = data.to_float(torch.stack([pictures[(i, None)][0] for i in wanted]), device)
        tokens = pair.image_encoder.tokens(x)
        e, source, target = pair.picture(tokens).split([len(rows), len(changes), len(changes)])
        change = pair.change(torch.cat([source, target], -1))
        here = [objects[row[0]] for row in rows]
        place = pair.place(at_objects(tokens[:len(rows)], here))
        rng = world.generator("pretrain", step)
        nouns = [world.with_article(world.noun(o, world.LOOK, rng)) for found in here for o in found]
        looks = [f"{o.shape} {o.colour} {o.size} {o.style}" for found in here for o in found]
        texts, orders = [row[1] for row in rows], [row[1] for row in changes]
        h, mean, words = pair.embed(encoder, texts + orders)
        said = pair.text(mean[:len(texts)]), pair.instruction(mean[len(texts):])
        name = pair.noun(pair.embed(encoder, nouns)[1])
        tau = pair.log_tau.exp().clamp(0.01, 1)
        loss = READING * sum(F.cross_entropy(logits, answer, ignore_index=-1)
                             for logits, answer in reader(h, words, texts + orders).values())
        for a, b, same in ((e, said[0], same_text(texts)), (change, said[1], same_text(orders)),
                           (place, name, same_text(looks))):
            same = same.to(device)
            loss = loss + 0.5 * (contrastive_loss(a, b, tau, same) + contrastive_loss(b, a, tau, same))
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        data.muon_step(matrices, momenta, optimizer.param_groups[0]["lr"], weight_decay=0.01)
        pair.zero_grad(set_to_none=True)
        reader.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss.item():.3f} tau {tau.item():.3f} "
                  f"{time.monotonic() - begin:.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            found = retrieval(pair, encoder, held_pictures, [row for row in held_out.rows if row[2] < 0])
            print(f"  held out: own caption first among 500: {found:.1%}; linear read-out of the patches: "
                  + ", ".join(f"{name} {share:.1%}" for name, share in
                              read_out(pair.image_encoder, (pictures, objects),
                                       (held_pictures, objects_of(held_out))).items()), flush=True)
            print(reading(encoder, reader, unseen), flush=True)
    learn_to_read(encoder, reader, [row[1] for row in told], unseen, args.read_steps)
    return pair.image_encoder, encoder


def spoken(names, *endings):
    """{word: name} for every word that the world has for these names, with the endings of a plural."""
    return {word + ending: name for name in names for word in world.WORDS.get(name, (name,))
            for ending in endings or ("",)}


ADJECTIVES = {word: (kind, name) for kind, names in
              (("colour", (*world.COLOURS, *world.BACKGROUNDS)), ("size", world.SIZES), ("style", world.STYLES))
              for word, name in spoken(names).items()}
NOUNS = spoken((*world.SHAPES, "background"), "", "s", "es")
COUNTS = ("a", "an", "the", *world.NUMBERS.values())
PLACE = re.compile(r" ?\b(?:at|in) (?:the )?(%s)\b" % "|".join(sorted(world.PLACES.values(), key=len)[::-1]))


def nouns_of(text: str) -> list[tuple[int, dict[str, str]]]:
    """Where each noun of a text of the built-in world ends, and what the text says of it.

    "a red circle above two stars" -> [(12, {noun: circle, count: a, size: "", style: "", colour: red,
    before: "", after: above, place: "", previous: "", previous colour: "", next: star, next colour: ""}), …]
    """
    words = [(match.group(), match.end()) for match in re.finditer(r"[a-z]+", text)]
    found, free = [], 0                                 # free: first word that no noun before has taken
    for k, (word, end) in enumerate(words):
        if word not in NOUNS:
            continue
        said, first = {"noun": NOUNS[word], "count": "", "size": "", "style": "", "colour": ""}, k
        while first > free and words[first - 1][0] in ADJECTIVES:
            first -= 1
            name, value = ADJECTIVES[words[first][0]]
            said[name] = value
        while first > free and words[first - 1][0] in COUNTS:
            first -= 1
            said["count"] = f"{words[first][0]} {said['count']}".strip()
        said["before"] = " ".join(w for w, _ in words[free:first])
        free = k + 1
        found.append((end, said))
    rest = [said["before"] for _, said in found[1:]] + [" ".join(w for w, _ in words[free:])]
    for k, (_, said) in enumerate(found):
        place = PLACE.match(rest[k])
        said["after"], said["place"] = PLACE.sub("", rest[k]).strip(), place.group(1) if place else ""
        said["before"] = PLACE.sub("", said["before"]).strip()
        for name, other in (("previous", k - 1), ("next", k + 1)):
            there = 0 <= other < len(found)
            said[name] = found[other][1]["noun"] if there else ""
            said[f"{name} colour"] = found[other][1]["colour"] if there else ""
    return found


class Reader(nn.Module):
    """A linear map from a noun's embedding to what its text says of it; `texts` show what can be said."""

    def __init__(self, texts: list[str], dim: int = D_TEXT):
        super().__init__()
        said = [said for text in texts for _, said in nouns_of(text)]
        self.values = {name: sorted({one[name] for one in said}) for name in said[0]}
        self.head = nn.Linear(dim, sum(map(len, self.values.values())))

    def forward(self, h, tokens, texts) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """h (B, L, dim) and tokens of texts (B) -> for each question (logits (M, values), answer (M)) over
        the M nouns; an answer that was never met is -1."""
        row, at, said = zip(*((i, tokens.char_to_token(i, end - 1), said)
                              for i, text in enumerate(texts) for end, said in nouns_of(text)))
        logits = self.head(h[list(row), list(at)]).split([len(v) for v in self.values.values()], dim=-1)
        return {name: (part, torch.tensor([values.index(one[name]) if one[name] in values else -1
                                           for one in said], device=h.device))
                for part, (name, values) in zip(logits, self.values.items())}


def learn_to_read(encoder: data.TextEncoder, reader: Reader, texts: list[str], unseen: list[str],
                  steps: int):
    """The text encoder reads on by itself, which is cheap: what binds words to nouns comes late."""
    network, device = encoder.network.requires_grad_(True), reader.head.weight.device
    optimizer = torch.optim.AdamW([*network.parameters(), *reader.parameters()], betas=(0.9, 0.98),
                                  weight_decay=0.01, fused=True)
    begin = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = data.learning_rate(step, steps, 50, 2e-3)
        some = [texts[i] for i in data.order(0, "pretrain read", len(texts), 256, step)]
        tokens = encoder.tokenize(some)
        h = network(**tokens.to(device)).last_hidden_state
        loss = sum(F.cross_entropy(logits, answer, ignore_index=-1)
                   for logits, answer in reader(h, tokens, some).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*network.parameters(), *reader.parameters()], 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"reading: step {step + 1} loss {loss.item():.3f} {time.monotonic() - begin:.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            print(reading(encoder, reader, unseen), flush=True)
    network.requires_grad_(False)


@torch.no_grad()
def reading(encoder, reader: Reader, texts: list[str]) -> str:
    """What share of what is said in unseen texts is told right."""
    tokens = encoder.tokenize(texts)
    h = encoder.network(**tokens.to(reader.head.weight.device)).last_hidden_state
    return "  reading, unseen texts: " + ", ".join(
        f"{name} {(logits.argmax(-1) == answer).float().mean().item():.1%}"
        for name, (logits, answer) in reader(h, tokens, texts).items())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="out", help="where the built-in world is, or is drawn")
    parser.add_argument("--to", default=str(data.HERE / "notes/tiny"), help="where the encoders go")
    parser.add_argument("--steps", type=int, default=350, help="of both encoders")
    parser.add_argument("--read-steps", type=int, default=600, help="then, of the text encoder alone")
    args = parser.parse_args()

    device, to = data.pick_device("auto"), Path(args.to)
    folder, held_out = data.read_folder("", out=args.out)
    image_encoder, text_encoder = train(folder, held_out, args, device)
    image_encoder.network.half().save_pretrained(to / "image_encoder")
    text_encoder.network.half().save_pretrained(to / "text_encoder")
    text_encoder.tokenizer.save_pretrained(to / "text_encoder")
    print(f"saved to {to}")


if __name__ == "__main__":
    main()
