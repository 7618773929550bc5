"""Train a decomposition: the LightningModule, its optimizer, its strategies, its checkpoints."""

import sys
import warnings

if not sys.warnoptions:  # whoever asks for warnings with `python -W` sees all of them
    # The frozen backbone stays in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r".*in eval mode at the start of training")
    # Lightning's use of torch.utils._pytree.
    warnings.filterwarnings("ignore", message=r".*LeafSpec")
