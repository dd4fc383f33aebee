"""Uses the installed package as a stranger would; `make package` runs it beside the wheel alone."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

import separate_loss
from separate_loss import SeparateLoss, functional, metrics

home = Path(separate_loss.__file__).parent
installed = {str(path.relative_to(home)) for path in home.rglob("*") if path.suffix != ".pyc"}

if "site-packages" not in home.parts:
    sys.exit(f"not the installed package: {home}")
if "py.typed" not in installed or version("separate-loss") != separate_loss.__version__:
    sys.exit(f"incomplete wheel: {sorted(installed)}")

torch.manual_seed(0)
model, head = torch.nn.Linear(20, 8), torch.nn.Linear(8, 3)
criterion = SeparateLoss(num_classes=3, feature_dim=8)
optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
target = torch.randint(3, (60,))
images = torch.randn(60, 20) + torch.nn.functional.one_hot(target, 20) * 3

for _ in range(100):
    features = model(images)
    softmax = torch.nn.functional.cross_entropy(head(features), target)
    loss = softmax + criterion(features, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

means = metrics.class_centers(features, target, 3)
agreement = metrics.center_agreement(criterion.centers, means)
apart = functional.inter_class_loss(criterion.centers)
print(f"separate-loss {separate_loss.__version__} from a wheel: loss {loss:.3f}, "
      f"center agreement {agreement:.3f}, L_inter {apart:.3f}")  # fmt: skip
if not (agreement > 0.9 and apart < 0.05):
    sys.exit("the loss did not do its work")
