"""Train a small transformer in NNX to write Python's reference, letter by letter.

    python examples/char_transformer.py                    # two minutes, 2 CPU cores
    python examples/char_transformer.py --optimizer adam   # the same with Adam
    python examples/char_transformer.py --fast             # a few seconds of training

The text is that of Python's own `help("assert")` and other topics. Every layer of the
transformer is preconditioned: embeddings, norms, attention and dense layers.
`nnx.Optimizer` forwards the keyword arguments of CG-FAC.

On transformers this small, CG-FAC takes fewer steps than Adam to the same loss, and
about the same time; try both.
"""

import argparse
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import optax_cgfac

LENGTH = 32  # characters that the model sees
PROMPT = "The following "


class Block(nnx.Module):
    """Attention, then a dense layer for each position; norms come first."""

    def __init__(self, width, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """A causal language model over characters."""

    def __init__(self, vocabulary, width, depth, rngs):
        self.characters = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        # A position for every example, since a layer's rows are those of examples.
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        x = self.characters(tokens) + self.positions(positions)
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x))


def loss_fn(model, windows):
    """The mean cross-entropy of a character after those before it."""
    logits = model(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean()


def draw_windows(text, num, rng):
    """Returns `num` pieces of the text, each a character longer than the model sees."""
    starts = jax.random.randint(rng, (num, 1), 0, len(text) - LENGTH)
    return text[starts + jnp.arange(LENGTH + 1)]


# ---------------------------------------------------------------- the optimizers
# Each function returns an optimizer, a curvature, and a step that trains with them.


def cgfac_training(model, windows):
    """CG-FAC: nothing to set."""
    estimator = optax_cgfac.fisher_estimator(
        lambda model, tokens: model(tokens), "softmax_cross_entropy"
    )
    curvature = estimator.init(model, windows[:, :-1])
    print(curvature.report(), end="\n\n")  # which layers are covered, and how
    optimizer = nnx.Optimizer(model, optax_cgfac.cgfac(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, curvature, text, rng):
        batch_rng, rng = jax.random.split(rng)
        batch = draw_windows(text, len(windows), batch_rng)
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        rest = jax.tree.map(jnp.copy, rest)  # with dropout value_fn needs the same keys
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        curvature = estimator.update(curvature, model, batch[:, :-1], rng=rng)

        def value_fn(params):  # copy=True: it is called below jax.lax.cond
            return loss_fn(nnx.merge(graphdef, params, rest, copy=True), batch)

        optimizer.update(
            model, grads, curvature=curvature, value=loss, value_fn=value_fn
        )
        return curvature

    return optimizer, curvature, train_step


def adam_training(model, windows):
    """Adam: a learning rate, found by trying, and no curvature."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, curvature, text, rng):
        batch_rng, _ = jax.random.split(rng)  # the batches that CG-FAC sees
        batch = draw_windows(text, len(windows), batch_rng)
        optimizer.update(model, nnx.grad(loss_fn)(model, batch))
        return curvature

    return optimizer, None, train_step


# ---------------------------------------------------------------- training


def train(model, training, parts, steps, batch_size, seed):
    """Trains the model.

    Args:
      model: A `Transformer`, which is changed.
      training: `cgfac_training` or `adam_training`.
      parts: The text to train on and the one to test with, as tokens.
      steps: How many.
      batch_size: Windows of a batch.
      seed: Of the windows and of CG-FAC's sampled targets.

    Returns:
      Rows for the table: steps, loss, loss of the test, seconds with compilation.
    """
    key = jax.random.key(seed)
    marks = {max(1, round(steps * part)) for part in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)}
    samples = [draw_windows(part, 512, jax.random.key(seed + 1)) for part in parts]
    evaluate = nnx.jit(loss_fn)
    windows = draw_windows(parts[0], batch_size, key)
    optimizer, curvature, train_step = training(model, windows)

    rows, seconds = [], 0.0
    start = time.perf_counter()
    bar = tqdm(range(1, steps + 1), unit="step")
    for step in bar:
        rng = jax.random.fold_in(key, step)
        curvature = train_step(model, optimizer, curvature, parts[0], rng)
        if step in marks:
            jax.block_until_ready(nnx.state(model))
            seconds += time.perf_counter() - start
            losses = [float(evaluate(model, sample)) for sample in samples]
            rows.append((step, *losses, seconds))
            bar.set_postfix_str("loss {1:.3f}, test {2:.3f}".format(*rows[-1]))
            start = time.perf_counter()
    return rows


# ---------------------------------------------------------------- the text


def read_text(num_characters):
    """Returns a text as tokens, and the characters that they stand for."""
    text = "\n".join(topics[name] for name in sorted(topics))[:num_characters]
    characters, tokens = np.unique(list(text), return_inverse=True)
    return jnp.asarray(tokens, jnp.int32), characters


@nnx.jit(static_argnames="num")
def write(model, window, rng, num):
    """Returns the `num` tokens that follow a window, drawn from the model."""

    def body(window, rng):
        logits = 1.5 * model(window[None])[0, -1]  # likely ones a little likelier
        token = jax.random.categorical(rng, logits)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(body, window, jax.random.split(rng, num))[1]


def main(argv=None):
    """Runs the command line; returns the rows of the table and what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="20 steps, a smaller model")
    parser.add_argument(
        "--optimizer", choices=("cgfac", "adam"), default="cgfac", help="(cgfac)"
    )
    parser.add_argument("--steps", type=int, help="how many (1000; fast: 20)")
    parser.add_argument("--batch-size", type=int, default=64, help="windows (64)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    args = parser.parse_args(argv)
    steps = (20 if args.fast else 1000) if args.steps is None else args.steps
    if steps < 1 or args.batch_size < 1:
        parser.error("expected --steps > 0 and --batch-size > 0")

    tokens, characters = read_text(50_000 if args.fast else 400_000)
    parts = jnp.split(tokens, [len(tokens) * 9 // 10])
    width, depth = (16, 1) if args.fast else (64, 2)
    model = Transformer(len(characters), width, depth, nnx.Rngs(args.seed))
    training = {"cgfac": cgfac_training, "adam": adam_training}[args.optimizer]
    rows = train(model, training, parts, steps, args.batch_size, args.seed)

    print("\ncross-entropy per character; the first step's seconds are compilation")
    print(f"{'step':>6}{'training':>10}{'test':>10}{'seconds':>10}")
    for row in rows:
        print("{:6d}{:10.3f}{:10.3f}{:10.1f}".format(*row))

    start = np.searchsorted(characters, list(f"{PROMPT:>{LENGTH}}"[-LENGTH:]))
    written = write(model, jnp.asarray(start), jax.random.key(args.seed), 120)
    text = PROMPT + "".join(characters[np.asarray(written)])
    print(f"\nwhat it writes:\n{text}")
    return rows, text


if __name__ == "__main__":
    main()
