"""Words hidden from a model, which is to find them by what stands around them: masked language modelling (Devlin et al.
2019, https://arxiv.org/abs/1810.04805), of whole words.

What is hidden is a function of the seed, the number of the sample and the place in its row, and of nothing else: the
same for any batch, mesh and number of hosts, when a run is continued, and another each time that a row comes again.

Legend: B batch, T length.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int32, UInt64

from jaxlm.data.tokenizer import Tokenizer

MASKED, RANDOM = 0.8, 0.1
"""Of hidden tokens, the shares in whose place the mask and any token stands; the rest stay, to be predicted too."""


class Noise:
    """Hides words of rows."""

    def __init__(self, tokenizer: Tokenizer, share: float, stream: str):
        """`share` is the chance of a word; each `stream` of rows has noise of its own."""
        assert tokenizer.mask_id is not None, "`Tokenizer.with_mask` comes first"
        self._share, self._stream, self._mask_id = share, stream, tokenizer.mask_id
        self._before, self._behind = tokenizer.joints()
        self._is_text = tokenizer.byte_lengths() > 0
        self._text_ids = np.flatnonzero(self._is_text).astype(np.int32)

    def hide(
        self, tokens_BT: Int32[np.ndarray, "B T"], segments_BT: Int32[np.ndarray, "B T"], samples: Sequence[int]
    ) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """What the model reads in place of `tokens_BT`, and which of them were hidden.

        Special ids and padding (segment 0) never are. A word ends with its document.
        """
        draws_BTD = np.stack([self._draws(sample, tokens_BT.shape[1]) for sample in samples])
        joined_BT = self._behind[tokens_BT[:, :-1]] & self._before[tokens_BT[:, 1:]]
        joined_BT &= segments_BT[:, :-1] == segments_BT[:, 1:]
        places_T = np.arange(tokens_BT.shape[1])
        begins_BT = np.pad(np.where(joined_BT, 0, places_T[1:]), ((0, 0), (1, 0)))
        begins_BT = np.maximum.accumulate(begins_BT, axis=1)  # the first place of each token's word
        chosen_BT = np.take_along_axis(draws_BTD[..., 0], begins_BT, axis=1) < self._share
        hidden_BT = chosen_BT & self._is_text[tokens_BT] & (segments_BT > 0)
        others_BT = self._text_ids[(draws_BTD[..., 2] * len(self._text_ids)).astype(np.int64)]
        fate_BT = draws_BTD[..., 1]
        noise_BT = np.where(fate_BT < MASKED, self._mask_id, np.where(fate_BT < MASKED + RANDOM, others_BT, tokens_BT))
        return np.where(hidden_BT, noise_BT, tokens_BT).astype(np.int32), hidden_BT

    def _draws(self, sample: int, length: int) -> Float[np.ndarray, "T 3"]:
        """Uniform numbers from 0 to 1, three for each place: whether its word is hidden, how, and by which token."""
        bits = raw_bits(f"noise {self._stream}", sample, 3 * length)
        return (bits >> np.uint64(11)).reshape(length, 3) * 2.0**-53


def raw_bits(stream: str, sample: int, count: int) -> UInt64[np.ndarray, "count"]:
    """Random numbers of 64 bits for a sample, the same for ever; each `stream` has its own."""
    # NumPy promises that a generator's raw bits never change, and of what it makes of them it does not.
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    return np.random.Philox(key=np.array([key, sample], np.uint64)).random_raw(count)
