"""The terms of OAL's loss and those of two peers, to be copied out: torch alone.

    loss = cross-entropy + 4 KL(logits) + 16 error(feature maps) + 1 MICL(outlier maps)

The sum stands in train.py, `OAL.forward`; these are its weights for a network trained from nothing.
Paper: Gao et al., arXiv 2406.16525. The losses of its own code are in released/released.py.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def ratio(logits, features, mean):
    """Logits [B, C], features [B, D], their ID mean [D] -> r [B] in float32, higher = more ID.

        r(h) = m / d,    m = top logit - mean logit,    d = |h - mean|

    m says how far the predicted class stands out, d how far the feature is from the centre of the
    ID features. Both grow with the length of a feature, as the energy does; their ratio hardly.
    """
    assert logits.dim() == 2 and logits.shape[1] > 1, "ratio takes logits [B, C], C at least 2"
    assert features.shape == (len(logits), *mean.shape), "ratio takes features [B, D] and mean [D]"
    logits, features = logits.float(), features.float()  # bf16 and float16 ratios would tie
    distance = (features - mean.float()).norm(dim=1)  # [B]
    return (logits.amax(1) - logits.mean(1)) / distance.clamp_min(1e-12)


class MICL(nn.Module):
    """Mutual-information contrast: a lower bound of I(h; Z) through the detector's own ratio.

    It is the balanced binary cross-entropy of ID image against outlier on one number, minus log 2.
    Z = 1 for an ID image and 0 for an outlier of the same batch, equally likely. For any q,
    I(h; Z) >= log 2 + E log q(Z|h) (Barber & Agakov 2003). Here q(Z = 1|h) = sigmoid(a (r - tau))
    with r of `ratio`: at r = tau both are equally likely, and a > 0 is the slope of the log-odds.
    a and tau are trained with the network, without weight decay. `mean` [D] is a running mean.

        critic = MICL.start(id_logits, id_features)      # of the network that is to be trained
        loss = loss + critic(logits, features, is_id)    # its parameters belong in the optimiser
        confidence = critic.score(logits, features)      # higher = more ID; at test time with the
                                                         # mean of all training features
    """

    def __init__(self, mean, a=1.0, tau=0.0):
        super().__init__()
        with torch.inference_mode(False):  # else it could not be trained
            self.register_buffer("mean", torch.as_tensor(mean).detach().float().clone())
            self.log_a = nn.Parameter(torch.as_tensor(a, dtype=torch.float32).detach().log())
            self.tau = nn.Parameter(torch.as_tensor(tau, dtype=torch.float32).detach().clone())

    @classmethod
    def start(cls, id_logits, id_features):
        """ID logits [N, C], features [N, D] -> critic; tau: 5 % quantile of r, a: 1 / std of r."""
        assert id_features.dim() == 2 and id_features.isfinite().all(), "start takes finite [N, D]"
        assert (id_features != id_features[0]).any(), "start takes at least two different features"
        mean = id_features.float().mean(0)
        r = ratio(id_logits, id_features, mean)
        return cls(mean, 1 / r.std().clamp_min(1e-6), r.quantile(0.05))

    def score(self, logits, features):
        """Logits [B, C], features [B, D] -> ratio r [B], higher = more ID."""
        return ratio(logits, features, self.mean)

    def forward(self, logits, features, is_id):
        """Logits [B, C], features [B, D], is_id bool [B] -> minus the bound in nats, a scalar.

        0: chance level; -log 2: perfect separation. A batch of one kind says nothing: 0. In
        training mode the running mean moves a tenth of the way to the mean of the batch's ID
        features (under torchrun, of the first process's).
        """
        assert is_id.shape == logits.shape[:1], "MICL takes a flag for each row"
        is_id = is_id.to(logits.device, torch.bool)
        n_id, n_outliers = is_id.sum(), (~is_id).sum()
        both = (n_id > 0) & (n_outliers > 0)
        n_id, n_outliers = n_id.clamp_min(1), n_outliers.clamp_min(1)
        if self.training:
            id_mean = (features.detach().float() * is_id[:, None]).sum(0) / n_id
            self.mean.lerp_(torch.where(both, id_mean, self.mean).to(self.mean), 0.1)
        log_odds = self.log_a.exp() * (ratio(logits, features, self.mean) - self.tau)  # [B]
        weight = torch.where(is_id, 0.5 / n_id, 0.5 / n_outliers)  # [B], both kinds weigh the same
        nll = F.binary_cross_entropy_with_logits(log_odds, is_id.float(), weight, reduction="sum")
        return torch.where(both, nll - math.log(2), 0.0)


def distill(student, teacher):
    """Logits [B, C] each -> KL(softmax(teacher) || softmax(student)) in nats, mean over the batch.

    Temperature 1, as released. A class that the teacher rules out by -inf adds 0.
    """
    assert student.dim() == 2 and student.shape == teacher.shape, "distill takes two tensors [B, C]"
    student, teacher = student.log_softmax(1), teacher.log_softmax(1)
    student = student.masked_fill(teacher == -math.inf, 0)
    teacher = teacher.clamp_min(torch.finfo(teacher.dtype).min)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distill_maps(student_maps, teacher_maps):
    """Squared error of feature maps over the teacher's mean square, summed over stages, a scalar.

    Two lists of maps [B, C, H, W]; the two maps of a stage have one shape. FitNets' hints (Romero
    et al., arXiv 1412.6550) without a regressor: teacher and student grew from the same weights.
    """
    pairs = list(zip(student_maps, teacher_maps, strict=True))
    for student, teacher in pairs:
        assert student.dim() == 4 and student.shape == teacher.shape, "distill_maps takes lists"
    return sum(F.mse_loss(student.float(), teacher.float()) / teacher.float().square().mean()
               for student, teacher in pairs)


def outlier_exposure(outlier_logits):
    """A peer: cross-entropy of outliers' logits [M, C] to the uniform distribution, a scalar.

    The loss of Outlier Exposure (Hendrycks et al., arXiv 1812.04606), there with weight 0.5.
    """
    assert outlier_logits.dim() == 2, "outlier_exposure takes logits [M, C]"
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
