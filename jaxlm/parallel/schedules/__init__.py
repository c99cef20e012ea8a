"""Pipeline schedules: who does what in which tick, as static tables made by plain NumPy.

A model of many layers is cut into virtual stages, one after the other; microbatches of a batch go through them forward,
and their cotangents come back. Which stage works on which microbatch when decides how long stages wait (the bubble) and
how many stage inputs they keep (the stash). A schedule is that decision, and here it is data: a `Table` of ticks x
stages, which one engine runs, whatever the schedule is called. In a tick all stages work side by side; between ticks
activations move one stage on and cotangents one stage back, around the ring of stages. Virtual stage `chunk * stages +
stage` is chunk `chunk` of stage `stage`.

- `gpipe`: all forwards, then all backwards. The stash grows with the microbatches. Huang et al. 2019, GPipe,
  https://arxiv.org/abs/1811.06965.
- `1f1b`: a stage goes backward as soon as it can, one forward and one backward a tick; the stash depends on the stages
  only. PipeDream-flush: Narayanan et al. 2021, Memory-efficient pipeline-parallel DNN training,
  https://arxiv.org/abs/2006.09503.
- `interleaved`: 1f1b where each stage holds several chunks, so that the ticks that fill and drain the pipeline are
  shorter. Narayanan et al. 2021, Megatron-LM, https://arxiv.org/abs/2104.04473.
- `zb`: the backward is split; the gradients of inputs, which other stages wait for, go before the gradients of weights,
  which nobody waits for. ZB-H1: Qi et al. 2024, Zero bubble pipeline parallelism, https://arxiv.org/abs/2401.10241.

`order` says when, `build` adds where values wait, `validate` proves the table, `simulate` says what it costs, and
`python -m jaxlm.parallel.schedules` draws it.
"""

from jaxlm.parallel.schedules.build import build, forward
from jaxlm.parallel.schedules.table import Table
from jaxlm.parallel.schedules.validate import validate

__all__ = ["Table", "build", "forward", "validate"]
