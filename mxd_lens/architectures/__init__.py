"""The architectures, registered with SAELens when this module is imported."""

from mxd_lens.architectures.affine_mxd import *
from mxd_lens.architectures.base import ARCHITECTURES, PairedTranscoder, register_architecture
from mxd_lens.architectures.batch_topk_transcoder import *
from mxd_lens.architectures.jumprelu_skip_transcoder import *
from mxd_lens.architectures.jumprelu_transcoder import *
from mxd_lens.architectures.molt import *
from mxd_lens.architectures.mxd import *
from mxd_lens.architectures.skip_mxd import *
from mxd_lens.architectures.skip_transcoder import *
from mxd_lens.architectures.topk_skip_transcoder import *
from mxd_lens.architectures.topk_transcoder import *
from mxd_lens.architectures.training import TrainingPairedTranscoder
