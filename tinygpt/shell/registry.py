"""The training stages that have a command. A new stage needs one file in `stages` and one line here."""

from ..stages.pretrain import Pretrain
from ..stages.reward import Reward
from ..stages.rlhf import RLHF
from ..stages.sft import SFT

STAGES = [Pretrain, SFT, Reward, RLHF]
