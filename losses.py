"""The terms of OAL's objective, and those of two peers. Each can be copied out alone: nothing here imports the project.

    released: cross-entropy + 4 KD(logits) + 8 KD(features) + 0.1 MICL(boundary outliers) + 0.2 MICL(latent outliers)
    here:     cross-entropy + 4 KD(logits) + 16 KD(feature maps) + 1 MICL(latent outliers), but for the embedded images

`distill_logits` and `distill_features` are those of the released code (openood/trainers/generative_ood_distill_trainer.py);
`distill_maps` is what a teacher that has grown from the student's start allows: its units are the student's.
MICL, the mutual-information contrast between ID features and outliers, is here as released (`micl_released`, expectation
zero), as CLUB's authors meant the bound (`CLUB`, with q fitted by likelihood on dependent pairs), and mended (`fit_critic`
and `micl_energy`, the default; `micl_bound` on the embedded images). README, section 'Audit', says why and shows the numbers.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def distill_logits(student_logits, teacher_logits):
    """KL(teacher || student) in nats, mean over the batch; logits [B, C] each, temperature 1 as released."""
    return F.kl_div(student_logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="batchmean", log_target=True)


def distill_features(student_features, targets):
    """KL(softmax(target) || softmax(student)) in nats, mean over the batch; features [B, D] each.

    `targets` is the projected teacher feature. As released, the gradient reaches the projection too.
    """
    return F.kl_div(student_features.log_softmax(1), targets.log_softmax(1), reduction="batchmean", log_target=True)


def distill_maps(student_maps, teacher_maps):
    """Mean squared difference of feature maps over the teacher's mean square, summed over the stages: 0 where all are equal.

    Lists of maps [B, C, H, W], a stage's two of one shape. FitNets' hints (Romero et al., arXiv 1412.6550) without a
    regressor between the two networks: the teacher has grown from the student's start, so their units correspond.
    The mean square is of the rows given, a process's share; where it is 0 the result is not finite.
    """
    return sum(F.mse_loss(student.float(), teacher.float()) / teacher.float().square().mean()
               for student, teacher in zip(student_maps, teacher_maps, strict=True))


class CLUB(nn.Module):
    """Contrastive log-ratio upper bound of the mutual information I(X; Y) in nats (Cheng et al., arXiv 2006.12013).

    q(y|x) = N(mean(x), diag(var(x))) with the log-variance in [-1, 1], as in the authors' code. The bound holds for
    *dependent* pairs (x_i, y_i) and a q that has been fitted to them by maximising `log_likelihood`.
    """

    def __init__(self, x_dim, y_dim, hidden):
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(x_dim, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, y_dim))
        self.log_var = nn.Sequential(nn.Linear(x_dim, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, y_dim), nn.Tanh())

    def forward(self, x, y):
        """Pairs x [B, X], y [B, Y] -> mean_i log q(y_i|x_i) - mean_ij log q(y_j|x_i) (equation 12), a scalar."""
        mean, log_var = self.mean(x), self.log_var(x)                       # [B, Y] each
        paired = (y - mean) ** 2
        # mean_j (y_j - mean_i)^2 without the [B, B, Y] tensor: about the centre of the y, where nothing cancels.
        centre = y.mean(0)
        all_pairs = (centre - mean) ** 2 + ((y - centre) ** 2).mean(0)
        return ((all_pairs - paired) / 2 * (-log_var).exp()).sum(1).mean()  # the log-determinants cancel

    def log_likelihood(self, x, y):
        """Mean of log q(y_i|x_i) in nats over pairs x [B, X], y [B, Y]: what q is fitted by, in its own step."""
        mean, log_var = self.mean(x), self.log_var(x)
        return -0.5 * ((y - mean) ** 2 * (-log_var).exp() + log_var + math.log(2 * math.pi)).sum(1).mean()


def micl_released(club, outliers, features):
    """MICL as released: CLUB between features [B, D] and *independently drawn* outliers [B, O], minimised with q.

    For independent pairs both means of the bound have the same expectation, whatever q and the features are: the term
    and its gradient are noise of expectation zero. Kept to be measured, not to be used.
    """
    return club(outliers, features)


def fit_critic(id_energy, id_distance, outlier_energy, outlier_distance):
    """The critic of the mended MICL -> the weight c of the distance, a float.

    With Z = 1 for ID features and 0 for outliers, equally likely, I(h; Z) >= log 2 + E log q(Z|h) for any q (Barber &
    Agakov 2003). Here q(Z = 1|h) = sigmoid(E(h) - c d(h) - t): E is the energy score log sum exp(logits), d the distance
    from the mean ID feature. Both grow with a feature's length, but outliers lie farther than their energy lets expect. c
    and t are where the bound is largest. Two numbers, because more would learn by heart what these outliers look like: with
    one per unit of the feature the bound is larger and real OOD images are told worse.

    Energies and distances of ID images [N] and of outliers [M]. Where a threshold tells all of them apart the bound has no
    largest value, and c is as large as 100 steps make it.
    """
    energy = torch.cat([id_energy, outlier_energy]).cpu().double()                       # [N + M]
    distance = torch.cat([id_distance, outlier_distance]).cpu().double()
    is_id = torch.arange(len(energy)) < len(id_energy)
    share = torch.where(is_id, 0.5 / len(id_energy), 0.5 / len(outlier_energy))          # both halves count alike
    centre, spread = distance.mean(), distance.std()
    c, t = torch.zeros_like(centre).requires_grad_(), energy.mean().requires_grad_()
    optimizer = torch.optim.LBFGS([c, t], max_iter=100, line_search_fn="strong_wolfe")

    def minus_bound():
        optimizer.zero_grad()
        surplus = energy - c * (distance - centre) / spread - t
        loss = (share * F.softplus(torch.where(is_id, -surplus, surplus))).sum()
        loss.backward()
        return loss

    optimizer.step(minus_bound)
    return (c / spread).item()


def whitening(points, ridge=0.1):
    """Points [N, P] -> the matrix [P, P] after which their covariance is, but for the ridge, the identity.

    Each unit is divided by its standard deviation, or by a hundredth of their mean where it hardly ever fires; `ridge` is
    added to the variances of 1 that this leaves. Differences of points have Mahalanobis lengths after it.
    """
    points = points - points.mean(0)
    std = points.std(0)
    std = std.clamp_min(max(0.01 * std.mean().item(), 1e-6))                             # [P]
    values, vectors = torch.linalg.eigh(torch.cov((points / std).T).cpu() + ridge * torch.eye(len(std)))
    return (vectors / values.sqrt()).to(std) / std[:, None]


def level(features, mean, radius, c):
    """What the critic adds to the energy: -c (|h - mean| - radius), features [B, D], whitened or not, mean [D] -> [B]."""
    return -c * ((features - mean).norm(dim=1) - radius)


def open_direction(features, levels, ridge=1e-3):
    """The linear map nearest to the levels: features [N, D], levels [N] -> (u [D], offset []) on the CPU, by ridge regression.

    Added to every row of a classifier and to its bias they move an image's logits by one number alike, so no
    probability changes: the direction that cross-entropy leaves open, and that energies hear.
    """
    features, levels = features.cpu().double(), levels.cpu().double()
    x = torch.cat([features, torch.ones(len(features), 1)], dim=1)                       # [N, D + 1]
    gram = x.T @ x
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, x.T @ levels).float()
    return solution[:-1], solution[-1]


def micl_energy(id_logits, outlier_logits, id_levels, outlier_levels):
    """MICL mended: the student's own energy becomes the critic E - c d of the information between a feature and
    'ID or outlier?', so that the detector needs nothing but logits.

    The mean of an image's logits is open: cross-entropy and distilled logits do not hear it, the energy does. It is
    regressed (smooth L1, in energy units; the outliers, a fifth of the batch, weigh half) on the critic's level. The start's
    own mean logit is about 0, as weight decay leaves it: the level is what the critic adds to its energy.
    Half of the level is measured in a frozen network, that start: in the student alone it could be met by bending the
    distance. Half is measured in the student, whose features the teacher has taught: their distances tell more.

    id_logits [B, C], outlier_logits [M, C], levels [B] and [M] of the same images and latents (`level`) -> scalar; 0
    where all means are the levels. `fit_critic` is the contrast: it decides how far outliers sink.
    """
    return (F.smooth_l1_loss(id_logits.mean(1), id_levels)
            + 0.5 * F.smooth_l1_loss(outlier_logits.mean(1), outlier_levels))


def micl_bound(id_logits, outlier_logits, accepted=0.9, way=0.1):
    """MICL mended, without a frozen network: the bound of `fit_critic` with q(Z = 1|h) = sigmoid(E - t), the energy alone.

    The network is trained to raise the bound: outliers push its energies down, ID images of low energy rise. t lies on the
    `way` from the energy that the share `accepted` of the batch's ID images exceed to the outliers' mean: at its start the
    lowest ID images would be lifted however far the outliers are, and t and all energies with them without end; half-way,
    near-OOD is lost. For the embedded images: on photographs it takes from near-OOD what it gives to far-OOD.

    id_logits [B, C], outlier_logits [M, C] -> minus the bound, a scalar in nats: above -log 2, 0 where all energies are
    equal, and more where they vary but tell nothing. The threshold is of the rows given: a process's share.
    """
    inlier, outlier = id_logits.logsumexp(1), outlier_logits.logsumexp(1)                # [B], [M]
    t = torch.lerp(inlier.detach().quantile(1 - accepted), outlier.detach().mean(), way)
    return 0.5 * (F.softplus(t - inlier).mean() + F.softplus(outlier - t).mean()) - math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# Two peers without real outliers, for README's table.


def logit_norm(logits, labels, temperature=0.04):
    """LogitNorm (Wei et al., arXiv 2205.09310): cross-entropy of logits [B, C] of length 1 / temperature."""
    return F.cross_entropy(F.normalize(logits, dim=1) / temperature, labels)


class VOS(nn.Module):
    """The uncertainty loss of VOS (Du et al., arXiv 2202.01197), 0.1 of which joins cross-entropy.

    A logistic regression, trained with the network, tells ID features from virtual outliers by a weighted energy:
    E = log sum_k w_k exp(logit_k) with w_k > 0 learned. Starts from w = 1 and from sigmoid(E).
    """

    def __init__(self, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_classes))
        self.logistic = nn.Parameter(torch.tensor([1.0, 0.0]))  # slope, offset

    def forward(self, id_logits, outlier_logits):
        """id_logits [B, C], outlier_logits [M, C] -> mean negative log-likelihood in nats over the B + M, a scalar."""
        logits = torch.cat([id_logits, outlier_logits])
        energy = (logits + self.weight.clamp_min(1e-6).log()).logsumexp(1)                   # [B + M]
        is_id = (torch.arange(len(logits), device=logits.device) < len(id_logits)).float()
        return F.binary_cross_entropy_with_logits(self.logistic[0] * energy + self.logistic[1], is_id)
