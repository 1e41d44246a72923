"""Which words speak for what a transformer says of a sentence.

A small transformer learns in a few seconds whether a sentence praises or complains; then its tokens
are coloured by what they add to its answer.
"""

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import graphopt
from graphopt.inspect.relevance import describe, explanation_html, token_text

GOOD, BAD = ("wonderful", "great", "moving"), ("dull", "awful", "tedious")
NEUTRAL = ("the", "film", "was", "and", "its", "story", "music", "ending")
WORDS = (*NEUTRAL, *GOOD, *BAD)
LENGTH = 8


class Reader(nn.Module):
    """One layer of self-attention over embedded words, averaged."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), width)
        self.places = nn.Embedding(LENGTH, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of complaint and praise, from ids of shape (batch, length)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.layer(self.words(ids) + self.places(places)).mean(1))


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sentences of neutral words with one word of praise or complaint, and which of them."""
    ids = torch.randint(len(NEUTRAL), (size, LENGTH), generator=generator)
    labels = torch.randint(2, (size,), generator=generator)
    places = torch.randint(LENGTH, (size,), generator=generator)
    which = torch.randint(3, (size,), generator=generator)
    ids[torch.arange(size), places] = len(NEUTRAL) + torch.where(labels == 1, 0, 3) + which
    return ids, labels


def train() -> nn.Module:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        ids, labels = batch(64, generator)
        loss = nn.functional.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    model = train()
    sentences = (
        "the film was wonderful and its story the",
        "its music was the ending and awful film",
    )
    tokens = [sentence.split() for sentence in sentences]
    ids = torch.tensor([[WORDS.index(word) for word in words] for words in tokens])
    explained = graphopt.explain(model, (ids,), composite="attnlrp")
    names = ("complaint", "praise")
    view = describe(explained, (ids,), title="Reader", tokens=tokens, name_of=names.__getitem__)
    console = Console()
    for sample in view.samples:
        assert sample.target is not None
        (found,) = sample.inputs
        console.print(f"{sample.target.name} ({sample.explained:.2f}):", end=" ")
        console.print(token_text(found.tokens, found.relevance))
        for entry in found.top(2):
            console.print(f"  {entry['token']:12} {entry['relevance']:+.3f}")
    page = Path(tempfile.mkdtemp()) / "explained.html"
    page.write_text(explanation_html(view), encoding="utf-8")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
