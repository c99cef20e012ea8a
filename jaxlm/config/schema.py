"""What a run is: every key of the configuration, its type, its default and its meaning. Nothing here imports jax."""

from dataclasses import dataclass, field
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
AttentionBackend = Literal["auto", "reference", "xla", "cudnn", "splash"]
RematPolicy = Literal["none", "full", "dots", "selective", "offload"]
Objective = Literal["next", "mask", "spans"]
"""What a model predicts: the next token, the tokens that were hidden (BERT), or the spans that were (T5)."""

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, so that it divides over `tp` and fills the matrix units."""


def padded(vocabulary: int) -> int:
    """`vocabulary` rounded up to the multiple that the tables are made with."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model: GPT-2, Llama, Mistral, Qwen, Gemma, BERT, RoBERTa and T5 are settings of these keys."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """decoder: a token sees those before it, and the next one is predicted. encoder: a token sees its whole document,
    and tokens that data.noise hid are predicted, by an output layer with a transform and a bias (BERT).
    encoder_decoder: an encoder reads a text and a decoder that sees all of it writes another, such as the spans that
    data.noise hid; a tied output layer is scaled by embed ** -0.5 (T5)."""
    layers: int = 4
    """Number of blocks; of an encoder_decoder, of each half."""
    embed: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads of a block."""
    kv_heads: int | None = None
    """Key and value heads: fewer than heads is grouped-query, 1 is multi-query attention (default: heads)."""
    head_size: int | None = None
    """Width of one head (default: embed / heads)."""
    mlp: int = 512
    """Hidden width of the feed-forward layer."""
    gated: bool = False
    """Feed-forward is activation(gate) * up (SwiGLU, GeGLU) instead of activation(up)."""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu_tanh"
    """Feed-forward nonlinearity; gelu is exact (erf)."""
    vocabulary: int | None = None
    """Token ids the model knows, before padding (default: the tokenizer's; it may be larger, never smaller)."""
    norm: Literal["layer", "rms", "rms_offset"] = "layer"
    """LayerNorm (with bias), RMSNorm, or RMSNorm that multiplies by 1 + weight (Gemma)."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside a norm."""
    norm_placement: Literal["pre", "post", "sandwich", "sum"] = "pre"
    """Norm of a sublayer's input, of its output (OLMo 2), of both (Gemma 2), or of what it was added to, and of the
    embedding in place of the last norm (BERT)."""
    positions: Literal["learned", "rotary", "relative", "none"] = "learned"
    """How a token knows where it stands: a table of positions, rotated queries and keys, or a bias of attention for
    each head and distance (T5)."""
    max_positions: int = 1024
    """Rows of the learned position table (tokens)."""
    token_types: int = 0
    """Rows of the table of token types, of which a text has the first and the second of a pair the second (BERT 2); 0
    has no such table."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_local_theta: float | None = None
    """Base of the rotary frequencies in layers with a window (default: rope_theta; Gemma 3: 10000)."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How rotary frequencies are stretched to contexts longer than those trained on."""
    rope_factor: float = 1.0
    """Stretch of rope_scaling."""
    rope_original_length: int = 8192
    """Context length before stretching (tokens)."""
    rope_frequencies: tuple[float, ...] = (1.0, 4.0)
    """Turns per original context below which a frequency is fully stretched, and above which it is left alone (yarn
    calls them beta_slow and beta_fast)."""
    biases: tuple[Literal["qkv", "output", "mlp"], ...] = ("qkv", "output", "mlp")
    """Which projections have biases: queries, keys and values, attention's output, the feed-forward layer (none: write
    nothing after the =, or [] in a recipe)."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of queries and keys: of each head (Qwen 3, Gemma 3) or of the whole projection (OLMo 2)."""
    windows: tuple[int, ...] = ()
    """Sliding-window length of each layer in tokens, repeated over the layers; 0 sees everything. Mistral 4096;
    Gemma 2 4096,0."""
    attention_softcap: float | None = None
    """Attention logits become cap * tanh(logits / cap) (Gemma 2: 50)."""
    logit_softcap: float | None = None
    """Output logits become cap * tanh(logits / cap) (Gemma 2: 30)."""
    query_scale: float | None = None
    """Queries are multiplied by this (default: head_size ** -0.5)."""
    tied: bool = True
    """The output layer is the transposed embedding."""
    embed_scale: bool = False
    """Embeddings are multiplied by sqrt(embed) (Gemma)."""
    dropout: float = 0.0
    """Dropout probability on the embedding and on each sublayer's output."""
    experts: int = 0
    """Experts of each feed-forward layer, each of width mlp (mixture of experts); 0 is one dense layer."""
    experts_per_token: int = 2
    """Experts that a token is sent to."""
    shared_experts: int = 0
    """Experts that every token goes through besides (DeepSeek)."""
    router: Literal["topk_softmax", "softmax", "sigmoid"] = "topk_softmax"
    """Weights of a token's experts: softmax among the chosen (Mixtral, Qwen 3), softmax over all (DeepSeek V2), or
    sigmoids that sum to 1 (DeepSeek V3)."""
    router_scale: float = 1.0
    """Multiplies the weights of the routed experts (DeepSeek V3: 2.5)."""
    capacity_factor: float = 0.0
    """Tokens that an expert takes of a sequence, over the mean; the rest are dropped. 0 drops none."""
    balance_loss: float = 0.0
    """Weight of the load-balancing loss, taken of each sequence (Switch, DeepSeek V3)."""
    balance_rate: float = 0.0
    """Step by which an expert's routing bias follows its load (balancing without a loss, DeepSeek V3: 1e-3)."""
    router_z_loss: float = 0.0
    """Weight of log(Z)^2 of the router's logits (ST-MoE: 1e-3)."""

    @property
    def key_value_heads(self) -> int:
        """kv_heads, where that is set."""
        return self.kv_heads or self.heads

    @property
    def causal(self) -> bool:
        """Whether a token that is written sees only those before it."""
        return self.architecture != "encoder"

    @property
    def head_width(self) -> int:
        """head_size, where that is set."""
        return self.head_size or self.embed // self.heads


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from and how they become batches."""

    path: tuple[str, ...] = ("stdlib",)
    """Corpora, comma-separated: "stdlib" (Python's own source), a file or folder of text, JSONL, Parquet or source
    code, or a prepared token folder."""
    weights: tuple[float, ...] = ()
    """Sampling weight of each corpus of path (default: by size)."""
    tokenizer: str = "bpe"
    """bytes, bpe (trained on the corpus), or the path of a tokenizer.json or .tiktoken file; prepared folders bring
    their own."""
    vocabulary: int = 2048
    """Tokens of a bpe tokenizer trained on the corpus."""
    text_key: str = "text"
    """The field that holds the text in JSONL and Parquet."""
    cache: str = "~/.cache/jaxlm"
    """Folder in which raw corpora are prepared on first use."""
    validation: float = 0.05
    """Fraction of documents held out, chosen by document."""
    packing: Literal["concat", "fit"] = "concat"
    """concat cuts the stream of documents at sequence ends; fit never cuts a document that fits, and pads."""
    noise: float = 0.0
    """Share of the text that is hidden, to be predicted from the rest: words (masked language modelling, for encoders;
    BERT 0.15) or spans (for encoder-decoders; T5 0.15); 0 hides none, and each token predicts the next."""
    document_mask: bool = True
    """Tokens attend only within their own document."""
    sequence_length: int = 128
    """Tokens of a sequence."""
    batch_size: int = 16
    """Sequences of a global batch, over all devices and microbatches."""
    seed: int = 0
    """Seed of the sample order; each epoch has its own order."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule and its schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """Update rule."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Shape after warmup; wsd holds the peak, then decays over the last decay_fraction of the run."""
    warmup_steps: int = 30
    """Steps of linear warmup from 0."""
    decay_fraction: float = 0.2
    """Share of train.steps over which wsd decays."""
    final_fraction: float = 0.1
    """Last learning rate over the peak."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices (never of norms, biases or position tables)."""
    beta1: float = 0.9
    """First-moment decay; momentum for sgd and muon."""
    beta2: float = 0.95
    """Second-moment decay (adamw, muon's adamw); for lion, that of its momentum."""
    epsilon: float = 1e-8
    """Added to the root of the second moment (adamw, muon's adamw), and to the norm that muon divides by."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    shard: Literal["none", "data"] = "none"
    """data spreads optimizer state and gradient accumulators over the data axis (ZeRO-1 and 2)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop and the loss."""

    steps: int = 600
    """Optimizer steps of the whole run."""
    log_every: int = 20
    """Steps between logged lines."""
    seed: int = 0
    """Seed of initialisation and dropout."""
    microbatches: int = 1
    """Parts of a batch whose gradients are accumulated before one update."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps the softmax normaliser near 1 (PaLM: 1e-4)."""
    label_smoothing: float = 0.0
    """Probability mass spread evenly over the vocabulary."""
    loss_chunk: int = 8192
    """Vocabulary entries whose logits exist at a time; 0 computes all at once."""
    max_skipped: int = 20
    """Bad steps in a row (not finite, or a loss of twice the median of the last 100) before the run goes back."""
    max_rewinds: int = 2
    """Times that a run goes back to a checkpoint: before bad steps, and on with the data after them, or before copies
    on its devices differed, with the same data. Then, or where none is before bad steps, it stops (exit code 3)."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How microbatches go through the stages of pp."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zb"] = "1f1b"
    """Order of forward and backward work; 1f1b's memory does not grow with the microbatches, interleaved has a smaller
    bubble, zb splits input from weight gradients."""
    microbatches: int | None = None
    """Parts of a batch that are in the pipeline together, at least one a stage (default: 4, 2 or 1 a stage, the most
    that the batch divides by)."""
    chunks: int = 2
    """Pieces of the model that each stage holds."""


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """How sequences are split over devices."""

    method: Literal["ring", "allgather", "ulysses"] = "ring"
    """Attention over cp: keys and values go around a ring, are gathered whole, or heads are exchanged for tokens."""
    sequence_parallel: Literal["auto", "on", "off"] = "auto"
    """Norms and residuals cut over tp by sequence, for less activation memory; auto does on GPU and TPU, where the
    sequence divides."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats."""

    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Matmuls and activations; auto is bfloat16 on accelerators and float32 on CPU; float16 adds dynamic loss
    scaling."""
    params: Literal["float32", "bfloat16"] = "float32"
    """Master weights and optimizer state."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved and kept."""

    every: int = 200
    """Steps between saves; the last step is always saved; 0 saves only there."""
    keep: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are never deleted; 0 turns it off."""
    on_failure: Literal["continue", "wait"] = "continue"
    """After a save that failed (disk full): train on to the next one, and end the run if that fails too; or stand still
    and try again until it works."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation and the sample at the end."""

    every: int = 200
    """Steps between evaluations; also at the end; 0 turns evaluation off."""
    batches: int = 8
    """Validation batches of one evaluation (fewer where the corpus has fewer)."""
    prompt: str = "def "
    """Prompt of the sample generated at the end."""
    sample_tokens: int = 96
    """Tokens of that sample; 0 turns it off."""


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where metrics go besides metrics.jsonl, and the profiler."""

    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder (extra: tensorboard)."""
    wandb: str | None = None
    """Weights & Biases project to report to (extra: wandb)."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A profiler window on demand."""

    steps: str | None = None
    """Steps to record, as first:last (10:13), written to the run folder's profile/ for TensorBoard or Perfetto."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Precedence: these defaults, then the recipe (--config), then --section.field=value."""

    mesh: str = "dp-1"
    """Devices by axis, as axis and size: dp4,tp2. Axes: rep pp dp fsdp ep cp tp; one size may be -1, the rest of the
    devices."""
    simulate: bool = True
    """On a CPU host, simulate as many devices as the mesh asks for."""
    distributed: bool = False
    """One of several processes: jax.distributed finds the others (SLURM, Kubernetes, TPU pods,
    JAX_COORDINATOR_ADDRESS)."""
    run: str = "runs/default"
    """The run folder: configuration, metrics, checkpoints, samples."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Continue from the run folder's newest valid checkpoint: if there is one, never, or fail without one."""
    attention: AttentionBackend = "auto"
    """Attention implementation; auto takes the fastest that can run and says which, anything else runs or fails."""
    remat: RematPolicy = "none"
    """What the backward pass recomputes: nothing, whole blocks, all but matmul results, all but named tensors, or
    those offloaded to host memory."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def objective(self) -> Objective:
        """What is predicted, which is the model's business."""
        others: dict[str, Objective] = {"encoder": "mask", "encoder_decoder": "spans"}
        return others.get(self.model.architecture, "next")
