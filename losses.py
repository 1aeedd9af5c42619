"""The terms of OAL's objective, and those of two peers. Each can be copied out alone: nothing here imports the project.

    oal:      cross-entropy + 4 KD(logits) + 16 KD(feature maps) + 1 MICL(latent outliers)
    released: cross-entropy + 4 KD(logits) + 8 KD(features) + 0.1 CLUB(boundary outliers) + 0.2 CLUB(latent outliers)

`distill` is the released code's (openood/trainers/oal_trainer.py); `distill_maps` is what a teacher with the student's
own units allows. MICL, the mutual-information contrast between ID features and outliers, is the class of that name;
`micl_released` is its released form, whose expectation is zero (README, section 'Audit').
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def distill(student, teacher):
    """KL(softmax(teacher) || softmax(student)) in nats, mean over the batch; temperature 1 as released.

    Logits [B, C]; in the released recipe, or from a teacher of another shape, also features [B, D] with a softmax over
    their units, where `teacher` is the projected teacher feature and the gradient reaches the projection too.
    """
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)


def distill_maps(student_maps, teacher_maps):
    """Mean squared difference of feature maps over the teacher's mean square, summed over stages: 0 if all are equal.

    Lists of maps [B, C, H, W], a stage's two of one shape. FitNets' hints (Romero et al., arXiv 1412.6550) without a
    regressor between the two networks: the teacher has grown from the student's start, so their units correspond.
    The mean square is of the rows given, a process's share; where it is 0 the result is not finite.
    """
    return sum(F.mse_loss(student.float(), teacher.float()) / teacher.float().square().mean()
               for student, teacher in zip(student_maps, teacher_maps, strict=True))


class CLUB(nn.Module):
    """Contrastive log-ratio upper bound of the mutual information I(X; Y) in nats (Cheng et al., arXiv 2006.12013).

    q(y|x) = N(mean(x), diag(var(x))) with the log-variance in [-1, 1], as in the authors' code. The bound holds for
    *dependent* pairs (x_i, y_i) and a q that has been fitted to them by maximising `log_likelihood`. The mean net has
    layers of the widths x_dim, *deeper, hidden / 2, y_dim.
    """

    def __init__(self, x_dim, y_dim, hidden, deeper=()):
        super().__init__()
        widths = [x_dim, *deeper, hidden // 2, y_dim]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.mean = nn.Sequential(*layers[:-1])
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


class MICL(nn.Module):
    """Mutual-information contrast: a lower bound of I(h; Z), whose critic is the OOD detector itself.

    Z = 1 for an ID image and 0 for an outlier that went through the network in the same batch, equally likely. For any
    q, I(h; Z) >= log 2 + E log q(Z|h) (Barber & Agakov 2003). Here q(Z = 1|h) = sigmoid(a (r(h) - tau)) with the ratio

        r(h) = m / d,  m = top logit - mean logit,  d = |h - mean|

    how far the predicted class stands out per unit of distance from the ID features' centre: whether a feature points
    along a class, whatever its length. tau is the ratio at which ID and outlier are equally likely, a > 0 how fast the
    odds change there. Both are trained with the network (no weight decay); `mean` [D] is a running mean of ID features.

        critic = MICL.start(id_logits, id_features)      # of the network that is to be trained
        loss = loss + critic(logits, features, is_id)    # in each step; critic's parameters in the optimiser
        confidence = critic.score(logits, features)      # at test time: higher = more in-distribution
    """

    def __init__(self, mean, a=1.0, tau=0.0):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean).detach().clone())
        self.log_a = nn.Parameter(torch.as_tensor(a, dtype=torch.float32).log())
        self.tau = nn.Parameter(torch.as_tensor(tau, dtype=torch.float32))

    @classmethod
    def start(cls, id_logits, id_features):
        """ID logits [N, C] and features [N, D] -> a critic; of their ratios tau is the 5 % quantile, 1 / a the std."""
        critic = cls(id_features.mean(0))
        ratio = critic.score(id_logits, id_features)
        return cls(critic.mean, 1 / ratio.std(), ratio.quantile(0.05))

    def score(self, logits, features):
        """Logits [B, C], features [B, D] -> ratio r [B], higher = more in-distribution."""
        distance = (features - self.mean).norm(dim=1)
        return (logits.amax(1) - logits.mean(1)) / distance.clamp_min(1e-12)

    def probability(self, ratio):
        """Ratios [B] of `score` -> q(Z = 1|h) [B], the probability of ID where ID and latents are equally likely."""
        return (self.log_a.exp() * (ratio - self.tau)).sigmoid().detach()

    def forward(self, logits, features, is_id):
        """Logits [B, C], features [B, D], is_id bool [B] -> minus the bound in nats, a scalar above -log 2.

        0 says nothing, -log 2 that every image is told. In training mode the running mean moves a tenth of the way to
        that of the ID features. Both kinds of rows have to be there.
        """
        n_id, n_outliers = is_id.sum(), (~is_id).sum()
        if self.training:
            self.mean.lerp_((features.detach() * is_id[:, None]).sum(0) / n_id, 0.1)
        odds = self.log_a.exp() * (self.score(logits, features) - self.tau)               # [B], log q(1|h) / q(0|h)
        wrong = F.softplus(torch.where(is_id, -odds, odds))                               # [B], -log q(Z|h)
        return (wrong * torch.where(is_id, 0.5 / n_id, 0.5 / n_outliers)).sum() - math.log(2)


# --- Two peers without real outliers, for README's table. ------------------------------------------------------------


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
