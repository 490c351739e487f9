"""Size and make-up of the world model's network."""

from dataclasses import dataclass, field
from typing import Literal

from vidworld.errors import ConfigError
from vidworld.model.attention import Backend


@dataclass(frozen=True)
class DiTConfig:
    """Size and make-up of the transformer."""

    width: int = 384
    depth: int = 12
    num_heads: int = 6
    num_kv_heads: int = 2
    """Key-value heads, shared by groups of query heads; they decide the size of the KV cache."""
    mlp_ratio: float = 8 / 3
    """Hidden width of the SwiGLU MLP over the model's, rounded up to a multiple of 64."""
    patch_size: int = 2
    time_every: int = 4
    """Every so many blocks, one attends along time."""
    num_registers: int = 4
    """Tokens that hold no data, for global information (arXiv 2309.16588)."""
    modulation_rank: int = field(default=0, metadata={"omit_default": True})
    """Rank of each block's map from the condition to shift, scale and gate; 0 for full maps, which are nearly
    half of the weights of a model."""
    noise_dims: int = 0
    """Size of the noise that selects one joint future of a frame (energy-score models); 0 for none."""
    members: int = field(default=0, metadata={"omit_default": True})
    """Members of an ensemble that share this network, each with a change of low rank to every matrix of the
    blocks; clips of a batch are theirs in turn. Loaded, it is an ensemble of so many worlds."""
    member_rank: int = field(default=8, metadata={"omit_default": True})
    """Rank of a member's changes."""
    attention: Backend = "auto"
    """How attention is computed; what does not run here warns and falls back to sdpa."""
    residual: Literal["float32", "autocast"] = field(default="float32", metadata={"omit_default": True})
    """What the residual stream is kept in under autocast: `autocast` is half the memory traffic, and rounds
    what each block adds."""
    previous_frame: bool = field(default=False, metadata={"omit_default": True})
    """Whether the tokens of a frame are given the frame before, as the context shows it, besides attention:
    what rests is then easily copied. Weights from before start it at zero, and mean what they meant."""
    copy_gate: bool = field(default=False, metadata={"omit_default": True})
    """Whether each latent is a mix, by a gate of its own, of what the network paints and the same one of the
    frame before (as in arXiv 1710.05268, sec. 3): what rests stays sharp. Needs `previous_frame`."""

    def __post_init__(self) -> None:
        counts = ("width", "depth", "num_heads", "num_kv_heads", "patch_size", "time_every")
        least = dict.fromkeys(counts, 1) | {
            "num_registers": 0,
            "noise_dims": 0,
            "modulation_rank": 0,
            "members": 0,
        }
        least["member_rank"] = 1
        self._hold({name: (getattr(self, name) >= low, f"at least {low}") for name, low in least.items()})
        self._hold(
            {
                "width": (self.width % self.num_heads == 0, f"a multiple of num_heads = {self.num_heads}"),
                "num_heads": (
                    self.width // self.num_heads % 4 == 0,
                    "width / num_heads divisible by 4 (rows and columns each rotate pairs)",
                ),
                "num_kv_heads": (
                    self.num_heads % self.num_kv_heads == 0,
                    f"a divisor of num_heads = {self.num_heads}",
                ),
                "members": (self.members != 1, "0, or 2 and more"),
                "copy_gate": (self.previous_frame or not self.copy_gate, "previous_frame with it"),
                "depth": (self.depth >= self.time_every, f"at least time_every = {self.time_every}"),
            }
        )

    def _hold(self, rules: dict[str, tuple[bool, str]]) -> None:
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ConfigError(
                    f"setting {name!r} of the model", got=getattr(self, name), expected=expected
                )

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.width // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        return -(-round(self.mlp_ratio * self.width) // 64) * 64

    def attends_time(self, layer: int) -> bool:
        """Whether block `layer` has time attention: the last of every `time_every`."""
        return (layer + 1) % self.time_every == 0
