"""Embed and retrieve with sentence-transformers from a store. docs/recipes/embed-and-retrieve.md"""

import tempfile

import datasets
from common import arguments, docstrings
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import actcache
from actcache.models.clients.sentence_transformers import merge

given = arguments(__doc__, documents=200)
texts, _ = docstrings(given.documents)
pairs = [(text.split(".")[0], text) for text in texts if "." in text[:-1]]  # the first sentence finds the docstring
full = SentenceTransformer(given.model, device="cpu")
full.max_seq_length = 64
half = full[0].model.config.num_hidden_layers // 2

with actcache.Recycler(
    full[0].model, full.tokenizer, layer=half, store=given.store, max_length=64, too_long="truncate"
) as recycler:
    recycler.fill([text for pair in pairs for text in pair], progress=False)
    model = recycler.reduce(full)  # a SentenceTransformer, whose first module looks texts up

    def found() -> float:
        queries, documents = zip(*pairs, strict=True)
        scores = model.similarity(model.encode(list(queries)), model.encode(list(documents)))
        return (scores.argmax(1) == scores.new_tensor(range(len(pairs)))).float().mean().item()

    print(f"found before training: {found():.0%} of {len(pairs)}")
    data = datasets.Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]})
    options = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=10,
        per_device_train_batch_size=16,
        learning_rate=2e-5,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    SentenceTransformerTrainer(model, options, train_dataset=data, loss=MultipleNegativesRankingLoss(model)).train()
    model.eval()
    print(f"found after training: {found():.0%}")
    print(f"merged into {type(merge(model, full)).__name__}, which computes any text anew")
