"""Train an EAGLE-3 head from stored samples, on a tiny Qwen3 that is made here. docs/recipes/train-eagle3.md"""

import numpy as np
import torch
from common import arguments
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

import actcache
from actcache.models.clients.draft_samples import DraftSamples

given = arguments(__doc__, documents=64)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 128}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
config = Qwen3Config(**sizes, **heads, max_position_embeddings=256, tie_word_embeddings=False)
verifier = Qwen3ForCausalLM(config).eval().requires_grad_(False)
layers = [1, 3, 5, 6]  # three inner ones, and the last one, before the final norm

# Conversations: here made up by the model itself. Yours come from recycler.chats(dataset, field="messages").
start = torch.randint(0, 128, (given.documents, 4))
conversations = verifier.generate(start, max_new_tokens=28, do_sample=True, pad_token_id=0, eos_token_id=None).numpy()


def rows_of(ids):
    """Return what the layers give, [tokens, layers, hidden]: vLLM does this for a model of real size."""
    seen = []
    modules = [verifier.model.layers[layer - 1] for layer in layers]
    hooks = [module.register_forward_hook(lambda _, args, out: seen.append(out)) for module in modules]
    verifier(torch.from_numpy(ids)[None])
    for hook in hooks:
        hook.remove()
    return torch.stack([(out[0] if isinstance(out, tuple) else out)[0] for out in seen], dim=1)


class Head(torch.nn.Module):
    """One decoder layer over three inner layers' rows and the next token: it foresees the token after that."""

    def __init__(self) -> None:
        super().__init__()
        self.join, self.narrow = torch.nn.Linear(3 * 64, 64), torch.nn.Linear(2 * 64, 64)
        self.layer = Qwen3DecoderLayer(config, 0)

    def forward(self, inner: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.narrow(torch.cat([self.join(inner), verifier.model.embed_tokens(ids)], -1))
        positions = torch.arange(ids.shape[1])[None]
        mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        out = self.layer(hidden, attention_mask=mask, position_embeddings=verifier.model.rotary_emb(hidden, positions))
        return verifier.lm_head(verifier.model.norm(out[0] if isinstance(out, tuple) else out))


with actcache.open(given.store) as store:
    with DraftSamples.create(
        store, layers, model="tiny-qwen3", hidden_size=64, dtype="float32", source="this script"
    ) as samples:
        samples.put(conversations, [rows_of(ids) for ids in conversations])
    with DraftSamples.find(store, layers, model="tiny-qwen3") as samples:
        head = Head()
        optimizer = torch.optim.AdamW(head.parameters(), 1e-3)
        for epoch in range(4):
            losses, agreed = [], []
            for number in np.random.default_rng(epoch).permutation(len(conversations)):
                ids = torch.from_numpy(conversations[number])
                rows = samples.get(ids, refresh=False)  # by its tokens, with its checksums
                wanted = verifier.lm_head(verifier.model.norm(rows[1:, -1]))  # what the model says itself
                logits = head(rows[None, :-1, :-1].flatten(2), ids[None, 1:])[0]
                loss = torch.nn.functional.cross_entropy(logits, wanted.softmax(-1))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                agreed.append((logits.argmax(-1) == wanted.argmax(-1)).float().mean().item())
            print(f"epoch {epoch}: loss {np.mean(losses):.2f}, the model's own token {np.mean(agreed):.0%}")
