"""What attributions are judged on: two networks with known truth, two with real weights."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.passes.relevance.judging import Removal
from graphopt.passes.relevance.judging.baselines import baseline_of
from tests.benchmarks import glyphs, keytokens
from tests.benchmarks.finetuning import docstrings
from tests.benchmarks.keytokens import TextClassifier
from tests.benchmarks.photos import crops, photos
from tests.zoo.pretrained import efficientnet_lite0, minilm_folder

# Libraries that the tests have in any case, and what their docstrings are about: graphs, images,
# algebra, charts.
TOPICS = ("networkx", "skimage", "sympy", "matplotlib")
_PER_TOPIC, _WORDS, _LONGEST = 250, (8, 20), 40
_DECAY = 5e-3
_BERT_EMBEDDING = "encoder.embeddings.word_embeddings"


@dataclass(frozen=True, eq=False)
class Task:
    """A network and samples of which the outputs are explained.

    Attributes:
        name: The section's.
        model: In eval mode; ``model(*inputs)`` gives ``(samples, classes)``.
        inputs: What it takes; the first is explained.
        targets: The classes that are explained: those that the model finds.
        removal: What is removed as one, and by what it is replaced.
        steps: Of the perturbation curves; None: one unit each.
        truth: ``(samples, length)`` or ``(samples, height, width)``, bool: what is known to
            matter; None where nothing is.
        embedding: Path of the module that embeds the first input, token ids; None for images.
        chunk: How many samples an attribution sees at once.
        accuracy: Of the model on samples that it wasn't trained on, or None.
        seed: Of attributions with randomness.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: Tensor
    removal: Removal
    steps: int | None = None
    truth: Tensor | None = None
    embedding: str | None = None
    chunk: int = 64
    accuracy: float | None = None
    seed: int = 0

    def shortened(self, samples: int | None = None, steps: int | None = None) -> Task:
        """The same on its first samples, with curves of so many steps."""
        allowed: Any = self.removal.allowed
        if isinstance(allowed, Tensor) and len(allowed) == len(self.targets):
            allowed = allowed[:samples]
        return dataclasses.replace(
            self,
            removal=dataclasses.replace(self.removal, allowed=allowed),
            inputs=tuple(each[:samples] for each in self.inputs),
            targets=self.targets[:samples],
            truth=None if self.truth is None else self.truth[:samples],
            steps=self.steps if steps is None else steps,
        )

    def parts(self) -> Iterator[Task]:
        """The task in chunks."""
        for index, rows in enumerate(torch.arange(len(self.targets)).split(self.chunk)):
            yield dataclasses.replace(
                self,
                inputs=tuple(value[rows] for value in self.inputs),
                targets=self.targets[rows],
                seed=self.seed + index,
            )

    @property
    def hits(self) -> int:
        """How many of the highest positions are compared with the truth: two tokens, ten pixels."""
        return 2 if self.embedding else 10

    def leaf(self) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """What gradients are taken of.

        Returns:
            The values (an image, or the embedded tokens), those of the baseline, and the targets'
            outputs ``(samples,)`` as a function of such values.
        """
        first, rest = self.inputs[0], self.inputs[1:]
        baseline = baseline_of(first, self.removal.baseline)
        if self.embedding is None:
            return first, baseline, lambda x: self._chosen(self.model(x, *rest))
        embed = self.model.get_submodule(self.embedding)

        def replaced(x: Tensor) -> Tensor:
            handle = embed.register_forward_hook(lambda *_: x)
            try:
                return self._chosen(self.model(*self.inputs))
            finally:
                handle.remove()

        with torch.no_grad():
            return embed(first), embed(baseline), replaced

    def _chosen(self, out: Tensor) -> Tensor:
        return out.gather(1, self.targets[:, None])[:, 0]


def _found(model: nn.Module, inputs: tuple[Tensor, ...], chunk: int) -> Tensor:
    with torch.no_grad():
        parts = torch.arange(len(inputs[0])).split(chunk)
        return torch.cat([model(*(v[rows] for v in inputs)).argmax(1) for rows in parts])


def glyph_task(samples: int = 60) -> Task:
    """Glyphs on texture: patches of 4x4, removed by the image's mean colour."""
    model = glyphs.trained()
    pixels, _, truth = glyphs.images(samples, seed=2)
    targets = _found(model, (pixels,), 60)
    removal = Removal(units=4, baseline="mean")
    accuracy = glyphs.accuracy(model)
    return Task(
        "glyphs", model, (pixels,), targets, removal, steps=25, truth=truth, accuracy=accuracy
    )


def token_task(samples: int = 200) -> Task:
    """Two key tokens among distractors, removed by the mask token, one by one."""
    model = keytokens.trained()
    ids, mask, _, truth = keytokens.sequences(samples, seed=2)
    targets = _found(model, (ids, mask), 200)
    removal = Removal(baseline=keytokens.MASK, allowed=mask)
    accuracy = keytokens.accuracy(model)
    return Task(
        "tokens", model, (ids, mask), targets, removal, truth=truth, embedding=_BERT_EMBEDDING,
        accuracy=accuracy,
    )  # fmt: skip


def _sentences() -> list[tuple[str, int]]:
    """The first sentences of docstrings, and which library each is of; shuffled."""
    rng = random.Random(0)
    found = []
    for label, package in enumerate(TOPICS):
        firsts = (text.split(". ")[0].rstrip(".") + "." for text in docstrings(package))
        kept = {s for s in firsts if _WORDS[0] <= len(s.split()) <= _WORDS[1] and "`" not in s}
        rows = sorted(kept)
        rng.shuffle(rows)
        found += [(text, label) for text in rows[:_PER_TOPIC]]
    rng.shuffle(found)
    return found


def minilm_task(samples: int = 60) -> Task:
    """MiniLM with its trained weights, and a linear probe that names a docstring's library.

    Words are removed by the mask token; the first and the last one, which are special, stay.
    """
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()  # the weights of a pooling layer go unused

    folder = minilm_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    model = TextClassifier(encoder, encoder.config.hidden_size, len(TOPICS)).eval()
    texts, labels = zip(*_sentences(), strict=True)
    coded = tokenizer(
        list(texts), padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt",
        return_special_tokens_mask=True,
    )  # fmt: skip
    ids, mask = coded["input_ids"], coded["attention_mask"]
    accuracy = _probe(model, ids, mask, torch.tensor(labels), held_out=200)
    chosen = slice(len(ids) - samples, len(ids))
    inputs = (ids[chosen], mask[chosen])
    allowed = (mask * (1 - coded["special_tokens_mask"]))[chosen]
    removal = Removal(baseline=tokenizer.mask_token_id, allowed=allowed)
    targets = _found(model, inputs, 30)
    return Task(
        "minilm", model, inputs, targets, removal, steps=12, embedding=_BERT_EMBEDDING, chunk=30,
        accuracy=accuracy,
    )  # fmt: skip


def _probe(
    model: TextClassifier, ids: Tensor, mask: Tensor, labels: Tensor, held_out: int
) -> float:
    """Logistic regression on the pooled states, in place; gives the accuracy on the last rows."""
    with torch.no_grad():
        parts = torch.arange(len(ids)).split(50)
        states = torch.cat([model.pooled(ids[rows], mask[rows]) for rows in parts])
    train, test = states[:-held_out], states[-held_out:]
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(model.head(train), labels[:-held_out])
        found = found + _DECAY * model.head.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    return float((model.head(test).argmax(1) == labels[-held_out:]).double().mean())


def efficientnet_task(each: int = 2) -> Task:
    """EfficientNet-Lite0 with its trained weights on crops of photos; patches of 28, by blur."""
    model = efficientnet_lite0().eval().to(memory_format=torch.channels_last)
    pixels = crops(photos(), each, seed=0)
    targets = _found(model, (pixels,), 10)
    removal = Removal(units=28, baseline="blur", batch_size=8)
    return Task("efficientnet", model, (pixels,), targets, removal, steps=16, chunk=10)


TASKS: dict[str, Callable[[], Task]] = {
    "glyphs": glyph_task,
    "tokens": token_task,
    "minilm": minilm_task,
    "efficientnet": efficientnet_task,
}
