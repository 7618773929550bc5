"""Pre-train koff-tiny from the bundled corpora.

    python recipes/koff_tiny/train.py

The defaults are the recipe of the weights in the package.  Needs torch >= 2.9
(for torch.optim.Muon), transformers and tokenizers; runs on a CPU.  Only the
``*.train`` files are read for training (tokenizer and model); the ``*.heldout``
files are read once, for the evaluation at the end.
"""

import argparse
import json
import lzma
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE_DATA = Path(__file__).resolve().parents[2] / "src" / "koff_lightning" / "tiny"
DOMAINS = ("en", "de", "fr", "es", "ru", "zh", "python")
BOS, EOS = "<|bos|>", "<|eos|>"


# --------------------------------------------------------------------------- data


def read_texts(corpora: Path, domain: str, split: str) -> list[str]:
    with lzma.open(corpora / f"{domain}.{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: dict[str, list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the same number of bytes from every domain."""
    tok = Tokenizer(models.BPE())
    # GPT-4-like split: English contractions, words with at most one leading
    # character, single digits, punctuation runs, line ends, runs of spaces (all
    # but the last space before a word: indentation becomes one token).
    split = (
        r"'(?i:[sdmt]|ll|ve|re)"
        r"|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
        r"|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]"
        r"|\s+(?!\S)"
        r"|\s+"
    )
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()

    budget = min(sum(len(t.encode()) for t in part) for part in texts.values())
    sample = []
    for domain, part in texts.items():
        order = np.random.default_rng(0).permutation(len(part))
        used = 0
        for i in order:
            if used >= budget:
                break
            sample.append(part[i])
            used += len(part[i].encode())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any UTF-8 string encodes
        show_progress=False,
    )
    tok.train_from_iterator(sample, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tok.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


class DomainStream:
    """Endless windows of one domain's train text.

    Every epoch shuffles the documents (bos, text, eos each), packs them end to end,
    drops a random number of tokens at the front and cuts windows, which come out
    in random order.
    """

    def __init__(self, docs: list[np.ndarray], seed: int):
        self.docs, self.rng = docs, np.random.default_rng(seed)
        self.tokens = sum(len(d) for d in docs)
        self.epochs, self.length, self.windows = 0, None, []

    def next(self, length: int) -> np.ndarray:
        if length != self.length or not self.windows:
            stream = np.concatenate([self.docs[i] for i in self.rng.permutation(len(self.docs))])
            stream = stream[self.rng.integers(length) :]
            n = len(stream) // length
            self.windows = list(self.rng.permutation(stream[: n * length].reshape(n, length)))
            self.length = length
            self.epochs += 1
        return self.windows.pop()


class Batches:
    """Windows of all domains; a domain's share of BYTES is (its size) ** 0.5,
    normalised: between equal shares and shares by size."""

    def __init__(self, docs: dict[str, list[np.ndarray]], n_bytes: dict[str, int], seed: int):
        self.rng = np.random.default_rng([seed, 99])
        self.streams = [DomainStream(docs[d], seed * 100 + i) for i, d in enumerate(DOMAINS)]
        share = np.array([n_bytes[d] ** 0.5 * sum(map(len, docs[d])) / n_bytes[d] for d in DOMAINS])
        self.edges = np.cumsum(share / share.sum())

    def next(self, n: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Stratified draw: every batch has close to the wanted domain mix.
        points = (np.arange(n) + self.rng.random(n)) / n
        picks = np.minimum(np.searchsorted(self.edges, points), len(DOMAINS) - 1)
        y = torch.from_numpy(np.stack([self.streams[i].next(length) for i in picks]).astype(np.int64))
        # Every window starts with bos, as every text that is tokenized later does.
        x = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)  # bos has id 0
        return x, y


# -------------------------------------------------------------------------- model


def make_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # residual outputs start at zero
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def fp32_attention(module, q, k, v, mask, scaling=None, dropout=0.0, **kwargs):
    """Causal attention in float32: on a CPU its backward is much faster than bfloat16's."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.float().repeat_interleave(groups, 1), v.float().repeat_interleave(groups, 1)
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k, v, is_causal=True)
    return out.transpose(1, 2).to(q.dtype), None


AttentionInterface.register("koff_fp32", fp32_attention)


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of the tied output layer, 1024 positions at a time, with the
    gradients made in the forward pass: the logits of the batch never exist at once."""

    @staticmethod
    def forward(ctx, hidden, weight, target, chunk=1024):
        n, w = len(hidden), weight.bfloat16()
        g_hidden, g_weight, loss = torch.empty_like(hidden), torch.zeros_like(weight), 0.0
        for i in range(0, n, chunk):
            h, t = hidden[i : i + chunk].bfloat16(), target[i : i + chunk, None]
            logp = torch.log_softmax((h @ w.T).float(), -1)
            loss = loss - logp.gather(1, t).sum()
            g = logp.exp_().scatter_add_(1, t, -torch.ones_like(t, dtype=logp.dtype))
            g = g.mul_(1 / n).bfloat16()
            g_hidden[i : i + chunk] = g @ w
            g_weight += g.T @ h
        ctx.save_for_backward(g_hidden, g_weight)
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        g_hidden, g_weight = ctx.saved_tensors
        return g_hidden * grad, g_weight * grad, None, None


@torch.no_grad()
def bits_per_byte(model, tokenizer, texts: list[str], window: int = 256) -> tuple[float, float, int]:
    """(bits per UTF-8 byte, nats, tokens).  A document is cut into windows of bos plus
    ``window - 1`` of its tokens, so every token is predicted exactly once."""
    rows = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        rows += [[0] + ids[i : i + window - 1] for i in range(0, len(ids), window - 1)]
    rows.sort(key=len)
    nats = 0.0
    for i in range(0, len(rows), 32):
        part = rows[i : i + 32]
        x = torch.full((len(part), max(map(len, part))), -100)
        for row, ids in zip(x, part):
            row[: len(ids)] = torch.tensor(ids)
        logits = model(input_ids=x.clamp(min=0)).logits[:, :-1].float()
        nats += F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1), reduction="sum", ignore_index=-100
        ).item()
    n_bytes = sum(len(t.encode()) for t in texts)
    return nats / math.log(2) / n_bytes, nats, sum(len(r) - 1 for r in rows)


# ----------------------------------------------------------------------- training


def save(model, tokenizer, folder: Path) -> None:
    """Write next to the folder, then swap: a reader never sees half a model."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for f in (new, old):
        shutil.rmtree(f, ignore_errors=True)
    new.mkdir(parents=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def worker(rank: int, args, docs, n_bytes, port: int) -> None:
    """One process per core, one thread each: gradients are summed, every process steps
    its share of the matrices and sends them to the others."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # keep the processes on different cores
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.procs)
    torch.manual_seed(args.seed)  # same initial weights everywhere
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "tokenizer") if rank == 0 else None
    model = make_model(args.vocab)
    model.config.use_cache = False
    model.set_attn_implementation("koff_fp32")
    body = torch.compile(model.model, dynamic=False) if args.compile else model.model
    batches = Batches(docs, n_bytes, args.seed + 1 + rank)

    params = list(model.parameters())
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    mine = matrices[rank :: args.procs]
    others = [p for p in params if not any(p is m for m in matrices)]  # embeddings, norms
    optimizers = [
        torch.optim.Muon(mine, lr=args.muon_lr, weight_decay=args.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [group["lr"] for opt in optimizers for group in opt.param_groups]

    step = tokens = 0
    start = saved = logged = time.time()
    mean, clock = None, torch.zeros(1)
    while True:
        # Progress 0..1 by steps or by the clock (of process 0, for all).
        clock[0] = step / args.steps if args.steps else (time.time() - start) / (60 * args.minutes)
        dist.broadcast(clock, 0)
        progress = clock.item()
        if progress >= 1:
            break
        # Warm up, stay, then linearly to zero.
        scale = min(1.0, (step + 1) / args.warmup, (1 - progress) / args.decay)
        for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks):
            group["lr"] = peak * scale
        length = 256 if progress < 1 - args.long else 512
        x, y = batches.next(args.batch // length // args.procs, length)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(input_ids=x).last_hidden_state
        loss = HeadLoss.apply(hidden.float().flatten(0, 1), model.lm_head.weight, y.flatten())
        loss.backward()

        flat = torch.cat([p.grad.flatten() for p in params]).div_(args.procs)
        dist.all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(g.view_as(p))
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for opt in optimizers:
            opt.step()
        for owner in range(args.procs):
            theirs = matrices[owner :: args.procs]
            flat = torch.cat([p.data.flatten() for p in theirs])
            dist.broadcast(flat, owner)
            if owner != rank:
                for p, w in zip(theirs, flat.split([p.numel() for p in theirs])):
                    p.data.copy_(w.view_as(p))
        model.zero_grad(set_to_none=False)

        step += 1
        tokens += x.numel() * args.procs
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        now = time.time()
        if rank == 0 and (step <= 5 or step % 25 == 0):
            with open(args.out / "log.jsonl", "a") as log:
                log.write(
                    json.dumps(
                        {
                            "step": step,
                            "tokens": tokens,
                            "seconds": round(now - start, 1),
                            "loss": round(mean, 4),
                            "lr_scale": round(scale, 4),
                            "length": length,
                            "seconds_per_step": round((now - logged) / (1 if step <= 5 else 25), 3),
                            "epochs": [s.epochs for s in batches.streams],
                        }
                    )
                    + "\n"
                )
            logged = now
        if rank == 0 and now - saved > args.snapshot_minutes * 60:
            save(model, tokenizer, args.out / "latest")
            saved = now

    if rank == 0:
        seconds = time.time() - start
        save(model, tokenizer, args.out / "latest")
        (args.out / "done.json").write_text(
            json.dumps(
                {
                    "steps": step,
                    "tokens": tokens,
                    "train_seconds": round(seconds, 1),
                    "final_loss": round(mean, 4),
                    "epochs": [s.epochs for s in batches.streams],
                }
            )
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpora", type=Path, default=PACKAGE_DATA / "corpora")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("koff-tiny-run"),
        help="work folder: log.jsonl, snapshots (latest/), final/ and heldout.json",
    )
    parser.add_argument("--minutes", type=float, default=45.0, help="training time")
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead")
    parser.add_argument("--procs", type=int, default=2, help="one per core")
    parser.add_argument("--batch", type=int, default=6144, help="tokens per step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=60, help="steps")
    parser.add_argument("--decay", type=float, default=0.6, help="last fraction, to zero")
    parser.add_argument("--long", type=float, default=0.15, help="last fraction, windows of 512")
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--snapshot-minutes", type=float, default=5.0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--eval-only", action="store_true", help="evaluate OUT/latest and stop")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    if not args.eval_only:
        args.out.mkdir(parents=True, exist_ok=True)
        texts = {d: read_texts(args.corpora, d, "train") for d in DOMAINS}
        tokenizer = train_tokenizer(texts, args.vocab)
        tokenizer.save_pretrained(args.out / "tokenizer")
        docs = {
            d: [
                np.array(ids + [tokenizer.eos_token_id], dtype=np.uint16)
                for ids in tokenizer(part, verbose=False)["input_ids"]
            ]
            for d, part in texts.items()
        }
        n_bytes = {d: sum(len(t.encode()) for t in part) for d, part in texts.items()}
        port = 29500 + os.getpid() % 1000
        mp.spawn(worker, (args, docs, n_bytes, port), nprocs=args.procs)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "latest")
    model = LlamaForCausalLM.from_pretrained(args.out / "latest", dtype=torch.float32).eval()
    result = {}
    for d in DOMAINS:
        bpb, nats, n = bits_per_byte(model, tokenizer, read_texts(args.corpora, d, "heldout"))
        result[d] = {"bits_per_byte": round(bpb, 4), "nats_per_token": round(nats / n, 4), "tokens": n}
        print(d, result[d], flush=True)
    (args.out / "heldout.json").write_text(json.dumps(result, indent=1))

    model.config.use_cache = True  # off for training only
    model.save_pretrained(args.out / "final")
    tokenizer.save_pretrained(args.out / "final")


if __name__ == "__main__":
    main()
