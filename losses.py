"""The terms of OAL's objective, and those of two peers. To copy one out, take `check` with it.

    oal:      cross-entropy + 4 KD(logits) + 16 KD(feature maps) + 1 MICL(outlier maps)
    released: cross-entropy + 4 KD(logits) + 8 KD(features)
              + 0.1 CLUB(boundary outliers) + 0.2 CLUB(latents)

The sums stand in train.py, classes `OAL` and `Released`. Paper: Gao et al., arXiv 2406.16525.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def check(fits, wanted, *given):
    """ValueError that names the shapes of the given tensors, unless they fit."""
    if not fits:
        shapes = ", ".join(str(list(one.shape)) if torch.is_tensor(one) else type(one).__name__
                           for one in given)
        raise ValueError(f"{wanted}: given {shapes}")


def distill(student, teacher):
    """KL(softmax(teacher) || softmax(student)) in nats, mean over the batch, a scalar.

    Logits [B, C]; or features [B, D], as in the released recipe, where the gradient reaches the
    projection of the teacher's features too. A class that the teacher rules out by -inf adds 0.
    Temperature 1 (openood/trainers/oal_trainer.py). ValueError: the shapes differ.
    """
    check(student.dim() == 2 and student.shape == teacher.shape,
          "distill takes two tensors [B, C]", student, teacher)
    student, teacher = student.log_softmax(1), teacher.log_softmax(1)
    student = student.masked_fill(teacher == -math.inf, 0)
    teacher = teacher.clamp_min(torch.finfo(teacher.dtype).min)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distill_maps(student_maps, teacher_maps):
    """Squared error of feature maps over the teacher's mean square, summed over stages, a scalar.

    Two lists of maps [B, C, H, W]; the two maps of a stage have one shape. FitNets' hints (Romero
    et al., arXiv 1412.6550) without a regressor: teacher and student grew from the same weights.
    ValueError: tensors in place of lists, or shapes that differ.
    """
    check(not any(map(torch.is_tensor, (student_maps, teacher_maps))),
          "distill_maps takes two lists of maps", student_maps, teacher_maps)
    pairs = list(zip(student_maps, teacher_maps, strict=True))
    for pair in pairs:
        check(pair[0].shape == pair[1].shape, "distill_maps takes pairs of one shape", *pair)
    return sum(F.mse_loss(student.float(), teacher.float()) / teacher.float().square().mean()
               for student, teacher in pairs)


class CLUB(nn.Module):
    """Contrastive log-ratio upper bound of the mutual information I(X; Y) (arXiv 2006.12013).

    q(y|x) = N(mean(x), diag(var(x))), with the log-variance in [-1, 1] as in the authors' code.
    The value bounds I(X; Y) if the pairs (x_i, y_i) are drawn jointly and q has been fitted to them
    by `log_likelihood`. For independent pairs, as in the release, the value and its gradient have
    expectation zero. Widths of the mean net: x_dim, *deeper, hidden / 2, y_dim.
    """

    def __init__(self, x_dim, y_dim, hidden, deeper=()):
        super().__init__()
        widths = [x_dim, *deeper, hidden // 2, y_dim]
        layers = []
        for width, next_width in zip(widths, widths[1:]):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
        self.mean = nn.Sequential(*layers[:-1])
        self.log_var = nn.Sequential(nn.Linear(x_dim, hidden // 2), nn.ReLU(),
                                     nn.Linear(hidden // 2, y_dim), nn.Tanh())

    def check(self, x, y):
        x_dim, y_dim = self.mean[0].in_features, self.mean[-1].out_features
        check(x.dim() == 2 and x.shape[1] == x_dim and y.shape == (len(x), y_dim),
              f"CLUB takes [B, {x_dim}] and [B, {y_dim}]", x, y)

    def forward(self, x, y):
        """x [B, X], y [B, Y] -> mean_i log q(y_i|x_i) - mean_ij log q(y_j|x_i) in nats, a scalar.

        Equation 12 of CLUB; the log-determinants of the two means cancel. ValueError: other shapes.
        """
        self.check(x, y)
        mean, log_var = self.mean(x), self.log_var(x)                 # [B, Y] each
        paired = (y - mean) ** 2
        # mean_j (y_j - mean_i)^2 without a [B, B, Y] tensor, by the mean and variance of the y.
        centre = y.mean(0)
        all_pairs = (centre - mean) ** 2 + ((y - centre) ** 2).mean(0)
        return ((all_pairs - paired) / 2 * (-log_var).exp()).sum(1).mean()

    def log_likelihood(self, x, y):
        """x [B, X], y [B, Y] -> mean of log q(y_i|x_i) in nats: what q is fitted by."""
        self.check(x, y)
        mean, log_var = self.mean(x), self.log_var(x)
        squared = (y - mean) ** 2 * (-log_var).exp()
        return -0.5 * (squared + log_var + math.log(2 * math.pi)).sum(1).mean()


class MICL(nn.Module):
    """Mutual-information contrast: a lower bound of I(h; Z), whose critic is the OOD detector.

    It is the balanced binary cross-entropy of ID image against outlier on one number, minus log 2.
    Z = 1 for an ID image and 0 for an outlier of the same batch, equally likely. For any q,
    I(h; Z) >= log 2 + E log q(Z|h) (Barber & Agakov 2003). Here q(Z = 1|h) = sigmoid(a (r - tau))
    with the ratio

        r(h) = m / d,    m = top logit - mean logit,    d = |h - mean|

    m says how far the predicted class stands out, d how far the feature is from the centre of the
    ID features. Both grow with the length of a feature, as the energy does; their ratio hardly.
    At r = tau ID and outlier are equally likely; a > 0 is the slope of the log-odds there. Both
    are trained with the network, without weight decay. `mean` [D] is a running mean.

        critic = MICL.start(id_logits, id_features)      # of the network that is to be trained
        loss = loss + critic(logits, features, is_id)    # its parameters belong in the optimiser
        confidence = critic.score(logits, features)      # higher = more ID; at test time with the
                                                         # mean of all training features
    """

    def __init__(self, mean, a=1.0, tau=0.0):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean).detach().float().clone())
        self.log_a = nn.Parameter(torch.as_tensor(a, dtype=torch.float32).log())
        self.tau = nn.Parameter(torch.as_tensor(tau, dtype=torch.float32))

    @classmethod
    def start(cls, id_logits, id_features):
        """ID logits [N, C], features [N, D] -> critic; tau: 5 % quantile of r, a: 1 / std of r.

        ValueError: fewer than two rows, or features that are all equal.
        """
        check(len(id_features) > 1 and (id_features != id_features[0]).any(),
              "MICL.start takes at least two different features", id_logits, id_features)
        critic = cls(id_features.float().mean(0))
        ratio = critic.score(id_logits, id_features)
        return cls(critic.mean, 1 / ratio.std().clamp_min(1e-6), ratio.quantile(0.05))

    def check(self, logits, features):
        check(logits.dim() == 2 and features.shape == (len(logits), *self.mean.shape),
              f"MICL takes [B, C] and [B, {len(self.mean)}]", logits, features)

    def score(self, logits, features):
        """Logits [B, C], features [B, D] -> ratio r [B] in float32, higher = more ID."""
        self.check(logits, features)
        logits, features = logits.float(), features.float()  # bf16 and float16 ratios would tie
        distance = (features - self.mean.float()).norm(dim=1)
        return (logits.amax(1) - logits.mean(1)) / distance.clamp_min(1e-12)

    def forward(self, logits, features, is_id):
        """Logits [B, C], features [B, D], is_id bool [B] -> minus the bound in nats, a scalar.

        0: chance level; -log 2: perfect separation. A batch of one kind says nothing: 0. In
        training mode the running mean moves a tenth of the way to the mean of the batch's ID
        features (under torchrun, of the first process's). ValueError: other shapes.
        """
        check(is_id.shape == logits.shape[:1], "MICL takes a flag for each row", logits, is_id)
        self.check(logits, features)
        is_id = is_id.bool()
        n_id, n_outliers = is_id.sum(), (~is_id).sum()
        both = (n_id > 0) & (n_outliers > 0)
        n_id, n_outliers = n_id.clamp_min(1), n_outliers.clamp_min(1)
        if self.training:
            id_mean = (features.detach().float() * is_id[:, None]).sum(0) / n_id
            self.mean.lerp_(torch.where(both, id_mean, self.mean).to(self.mean), 0.1)
        log_odds = self.log_a.exp() * (self.score(logits, features) - self.tau)  # [B]
        weight = torch.where(is_id, 0.5 / n_id, 0.5 / n_outliers)  # [B], both kinds weigh the same
        nll = F.binary_cross_entropy_with_logits(log_odds, is_id.float(), weight, reduction="sum")
        return torch.where(both, nll - math.log(2), 0.0)


def fit_critic(id_scores, outlier_scores):
    """Scores of ID images [N] and of outliers [M] -> (a, tau) of P(ID) = sigmoid(a (score - tau)).

    Two float32 scalars: those for which MICL's bound is highest, each kind weighing the same. The
    targets are Platt's (1999), (N + 1) / (N + 2) and 1 / (M + 2), so that a is finite where the two
    kinds do not overlap. a > 0, and close to 0 where outliers score above ID images.
    ValueError: an empty input or a number that is not finite.
    """
    pair = [torch.as_tensor(one).detach().cpu().double() for one in (id_scores, outlier_scores)]
    check(all(one.dim() == 1 and len(one) and one.isfinite().all() for one in pair),
          "fit_critic takes finite scores [N] and [M]", id_scores, outlier_scores)
    scores, (n, m) = torch.cat(pair), map(len, pair)
    mean, std = scores.mean(), scores.std().clamp_min(1e-6)
    x = (scores - mean) / std
    is_id = torch.arange(n + m) < n
    target = torch.where(is_id, (n + 1) / (n + 2), 1 / (m + 2)).double()
    weight = torch.where(is_id, 0.5 / n, 0.5 / m).double()
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # slope, offset
    optimizer = torch.optim.LBFGS([line], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(line[0] * x + line[1], target, weight,
                                                  reduction="sum")
        loss.backward()
        return loss
    with torch.enable_grad():
        optimizer.step(closure)
    slope, offset = line.detach()
    if slope < 1e-3:
        slope, offset = torch.tensor(1e-3), torch.tensor(0.0)
    return (slope / std).float(), (mean - std * offset / slope).float()


def outlier_exposure(outlier_logits):
    """A peer: cross-entropy of outliers' logits [M, C] to the uniform distribution, a scalar.

    The loss of Outlier Exposure (Hendrycks et al., arXiv 1812.04606), there with weight 0.5.
    """
    return -outlier_logits.log_softmax(1).mean()


class VOS(nn.Module):
    """A peer: the uncertainty loss of VOS (Du et al., arXiv 2202.01197).

    A logistic regression, trained with the network, tells ID features from virtual outliers by a
    weighted energy E = log sum_k w_k exp(logit_k), w_k > 0. It starts as sigmoid(E) with w = 1.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_classes))
        self.logistic = nn.Parameter(torch.tensor([1.0, 0.0]))  # slope, offset

    def forward(self, id_logits, outlier_logits):
        """Logits [B, C] and [M, C] -> mean negative log-likelihood in nats over B + M, a scalar."""
        logits = torch.cat([id_logits, outlier_logits])
        energy = (logits + self.weight.clamp_min(1e-6).log()).logsumexp(1)       # [B + M]
        is_id = torch.arange(len(logits), device=logits.device) < len(id_logits)
        slope, offset = self.logistic
        return F.binary_cross_entropy_with_logits(slope * energy + offset, is_id.float())
