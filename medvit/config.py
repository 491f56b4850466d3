"""Configuration: YAML plus key=value, checked into one typed, frozen record.

Unknown keys are errors that name the nearest known key. Section names equal package names where there is one.
Everything has a default, so that a config file says only what is particular; the run saves it as resolved.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medvit.records import Preprocessing, UsageError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AugmentConfig(_Section):
    """Training augmentation, in HU before windowing; 0 turns a part off."""

    rotate_deg: float = Field(15.0, ge=0, le=45, description="rotation, uniform within plus or minus")
    shift: float = Field(0.05, ge=0, le=0.3, description="shift, share of the picture's side")
    zoom: float = Field(0.1, ge=0, le=0.5, description="zoom, uniform within 1 plus or minus")
    noise_hu: float = Field(15.0, ge=0, description="largest standard deviation of added noise, HU")
    blur_px: float = Field(0.7, ge=0, description="largest Gaussian blur, px: a softer kernel")
    window_jitter: float = Field(
        0.1, ge=0, lt=1, description="level moves by this share of the width; so does the width"
    )
    flip: bool = Field(False, description="left-right flips: never for lateralised findings")


class ViewsConfig(_Section):
    """Views of slices for pretraining without labels: crops of HU, each varied by data.augment on its own."""

    count: int = Field(2, ge=1, le=8, description="views of a slice; objective simclr, mocov3 and dino compare two")
    crop: tuple[float, float] = Field((0.4, 1.0), description="smallest and largest area of a view, share of a slice")
    local: int = Field(0, ge=0, le=16, description="dino: small crops beside the views, which only the student sees")
    local_crop: tuple[float, float] = Field((0.1, 0.4), description="smallest and largest area of a small crop")
    local_size: int = Field(96, gt=0, description="rows and columns of a small crop, px; a multiple of the patch")
    neighbours: int = Field(
        1, ge=0, description="views after the first may be of slices so far away in the series; 0: of the same slice"
    )

    @model_validator(mode="after")
    def _areas_in_order(self) -> ViewsConfig:
        for name, (small, large) in (("crop", self.crop), ("local_crop", self.local_crop)):
            if not 0 < small <= large <= 1:
                raise ValueError(f"{name}: {[small, large]}; give smallest and largest area, above 0 and at most 1")
        return self


class DataConfig(_Section):
    """Splits, caching and loading."""

    folds: int = Field(0, ge=0, description="k: patient-grouped k-fold, predictions out of fold; 0: one held-out split")
    test_fraction: float = Field(0.25, gt=0, lt=1, description="share of patients held out when folds is 0")
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="share of training patients for model selection")
    holdout_sites: tuple[str, ...] = Field((), description="leave these sites out: they become the test split")
    target_sites: tuple[str, ...] = Field(
        (),
        description="adapt to these sites: their labels never train or select; test_fraction of their labelled "
        "patients is the test split, all others are trained on without labels",
    )
    sampling: Literal["shuffle", "balanced"] = Field(
        "shuffle", description="balanced: every cell of `balance` as often as any other, rare cases drawn repeatedly"
    )
    balance: tuple[str, ...] = Field(
        ("label",),
        min_length=1,
        description="columns whose combinations are the cells of balanced sampling: label, site, sex or a further one; "
        "[label, sex] serves rare groups better and costs what the report then shows",
    )
    normalise: Literal["backbone", "training"] = Field(
        "backbone",
        description="mean and std per window: the pretrained weights' own, or of the training split (weights=none); "
        "preprocessing.mean and std go before both",
    )
    cache_dir: Path | None = Field(None, description="null: MEDVIT_CACHE, else inside the run. Holds pixels: PHI")
    workers: int = Field(0, ge=0, description="loader processes; 0 loads in the training process")
    augment: AugmentConfig | None = Field(AugmentConfig(), description="null: none, and a frozen backbone is cached")
    views: ViewsConfig = Field(ViewsConfig(), description="what pretraining without labels sees of a slice")


class ModelConfig(_Section):
    """Backbone, pooling and head."""

    name: str = Field("vit_small_patch14_dinov2.lvd142m", description="any timm model name")
    weights: str = Field(
        "hub",
        description="hub, none, a local .safetensors file with timm's names, or a run of medvit-train (its backbone)",
    )
    options: dict[str, int | float | bool] = Field(
        {}, description="further arguments of the timm model, for example {depth: 4, patch_size: 8}"
    )
    features: Literal["cls_mean", "pooled"] = Field(
        "cls_mean",
        description="cls_mean: CLS (if any) and mean patch token; pooled: timm's own pooling. Not of tuning=synqt, "
        "whose answers are the features",
    )
    pooling: Literal["attention", "mean", "max"] = Field("attention", description="slices to study")
    pooling_width: int = Field(64, gt=0, description="hidden width of the attention pooling")
    head: Literal["linear", "mlp"] = Field("linear", description="mlp: 512 hidden units with dropout 0.5 and 0.3")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the linear head")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the backbone, linear in depth")
    tuning: Literal["full", "linear", "lora", "synqt"] = Field(
        "full",
        description="what of the backbone learns: full: its own weights, as stages say; linear: nothing; lora: a "
        "low-rank change of its attention; synqt: a small network beside it",
    )
    lora_rank: int = Field(8, gt=0, description="with tuning=lora")
    prompts: int = Field(1, gt=0, description="with tuning=synqt: queries at each block, memory against accuracy")

    @property
    def learns(self) -> bool:
        """Whether training can change anything of the backbone."""
        return self.tuning != "linear"

    @property
    def trunk_learns(self) -> bool:
        """Whether training changes the weights of the backbone that slices go through."""
        return self.tuning in ("full", "lora")


class AccelerationStep(_Section):
    """How little of a slice the backbone sees from some point of the training on."""

    from_progress: float = Field(..., ge=0, lt=1, description="share of the training at which it begins")
    keep: float = Field(1.0, gt=0, le=1, description="share of the patch tokens that are kept, others for each slice")
    patch: int | None = Field(
        None, gt=0, description="side of a patch, px, a divisor of the size of slices; null: the model's own"
    )


class AccelerationConfig(_Section):
    """Fewer tokens early, all of them at the end. medvit-schedule measures which schedule suits a task."""

    schedule: tuple[AccelerationStep, ...] = Field(
        ..., min_length=1, description="from the beginning on, never fewer tokens than before, in the end all of them"
    )
    symmetric: bool = Field(
        False, description="a teacher sees as little as its student; otherwise (asymmetric) it sees all"
    )

    @model_validator(mode="after")
    def _begins_and_ends(self) -> AccelerationConfig:
        begins = [step.from_progress for step in self.schedule]
        last = self.schedule[-1]
        if begins[0] != 0 or sorted(set(begins)) != begins:
            raise ValueError(f"schedule: its steps begin at {begins}; the first begins at 0, each other one later")
        if (last.keep, last.patch) != (1, None) or last.from_progress > LATEST_UNCOMPRESSED:
            raise ValueError(
                f"schedule: its last step must be uncompressed (keep 1, patch null) and begin at {LATEST_UNCOMPRESSED} "
                "or before: a model that never learned from whole slices is worse at them"
            )
        return self


LATEST_UNCOMPRESSED = 0.9
"""Share of what a backbone learns after which it sees whole slices again, at the latest: its last tenth is whole."""


class PretrainingConfig(_Section):
    """Learning without labels: what simclr, mocov3, dino and mae need to know."""

    temperature: float = Field(0.2, gt=0, description="of similarities (simclr, mocov3) or of the student (dino)")
    hidden: int = Field(2048, gt=0, description="hidden units of the projection head, which is thrown away")
    width: int = Field(256, gt=0, description="numbers that a slice is projected to")
    momentum: float = Field(
        0.99, ge=0, lt=1, description="mocov3, dino: share of the past in the momentum encoder; a cosine takes it to 1"
    )
    freeze_patches: bool = Field(
        True, description="mocov3: the patch projection stays as it is, which keeps training stable"
    )
    prototypes: int = Field(4096, gt=1, description="dino: outputs of the head; the paper has 65536 for ImageNet")
    teacher_temperature: tuple[float, float] = Field((0.04, 0.07), description="dino: at the beginning, and after")
    teacher_warmup: float = Field(0.3, ge=0, le=1, description="dino: share of the steps in which it rises")
    center_momentum: float = Field(0.9, ge=0, lt=1, description="dino: share of the past in the centre of outputs")
    mask_share: float = Field(0.75, gt=0, lt=1, description="mae: share of the patches that are hidden")
    decoder_width: int = Field(256, gt=0, multiple_of=32, description="mae: width of the decoder; heads are of 32")
    decoder_depth: int = Field(2, gt=0, description="mae: blocks of the decoder, which is thrown away")


PRETRAINING = ("simclr", "mocov3", "dino", "mae")
"""Objectives that learn without labels."""


class ObjectiveConfig(_Section):
    """What is minimised: cross-entropy on labelled cases, with it what makes sites alike, or a task without labels."""

    name: Literal["supervised", "dann", "cdan", "mmd", "simclr", "mocov3", "dino", "mae"] = Field(
        "supervised",
        description="cross-entropy alone, with adaptation to data.target_sites (dann, cdan, mmd), or pretraining "
        "without labels (simclr, mocov3, dino, mae)",
    )
    pretraining: PretrainingConfig = PretrainingConfig()
    class_weights: bool = Field(True, description="weigh classes by their inverse frequency in what training draws")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    focal_gamma: float = Field(0.0, ge=0, description="focal loss: 0 is cross-entropy, 2 is usual")
    mixup: float = Field(0.0, ge=0, description="Beta(a, a) of the mixing share; 0: off, 0.2 is usual")
    cutmix: float = Field(0.0, ge=0, description="the same for pasted boxes, 1.0 is usual; with both, one per batch")
    strength: float = Field(1.0, ge=0, description="weight of the adaptation: 1 for dann and cdan, 0.1 for mmd")
    begin: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the steps in which the source is learned alone, before adaptation comes in",
    )
    discriminator_width: int = Field(256, gt=0, description="hidden units of the domain head of dann and cdan")
    discriminator_rate: float = Field(
        10.0, gt=0, description="how many times as fast as the head of classes the domain head learns (dann, cdan)"
    )
    entropy: bool = Field(True, description="cdan: confident cases count more (CDAN+E)")
    kernel: Literal["rbf", "linear"] = Field("rbf", description="mmd: several bandwidths around the median, or linear")
    unbiased: bool = Field(False, description="mmd: the unbiased estimate, which can be below zero")
    acceleration: AccelerationConfig | None = Field(
        None,
        description="fewer patch tokens early in the training, while the backbone learns; null: off. Compare the "
        "recall of each class afterwards (medvit-evaluate --baseline): what is small may be lost",
    )

    @property
    def symmetric(self) -> bool:
        """Whether a teacher is to see as little of a slice as its student."""
        return self.acceleration is not None and self.acceleration.symmetric

    @property
    def adapts(self) -> bool:
        """Whether it learns from unlabelled cases of target sites."""
        return self.name in ("dann", "cdan", "mmd")

    @property
    def pretrains(self) -> bool:
        """Whether it learns a backbone without labels."""
        return self.name in PRETRAINING


class Stage(_Section):
    """One stretch of training with its own optimizer (DESIGN decision 5)."""

    name: str = "all"
    epochs: int = Field(20, gt=0)
    trainable: Literal["head", "top", "all"] = Field(
        "all", description="head: frozen backbone; top: its last blocks and final norm too; all: everything"
    )
    blocks: int = Field(3, gt=0, description="with trainable=top: how many blocks")
    size: int | None = Field(
        None, gt=0, description="px in this stage, rounded to the patch; null: preprocessing.size. The last stage's is"
    )
    lr: float = Field(3e-4, gt=0, description="peak learning rate of pooling and head")
    backbone_lr: float | None = Field(None, gt=0, description="peak of the backbone's top block; null: a tenth of lr")
    layer_rates: Literal["flat", "decay", "multiplier"] = Field(
        "flat",
        description="flat: one rate; decay: each block layer_decay times the one above; multiplier: embeddings 0.1, "
        "first two blocks 0.5, the rest 1",
    )
    layer_decay: float = Field(0.75, gt=0, le=1, description="with decay; 1/2.6 = 0.385 is ULMFiT's, for few layers")
    weight_decay: float = Field(0.05, ge=0, description="not on biases, norms, tokens and position embedding")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of steps")
    min_lr: float = Field(0.01, ge=0, le=1, description="end of the cosine, as a share of each group's own peak")
    schedule: Literal["cosine", "restarts"] = Field("cosine", description="restarts: cosine again and again")
    restart_epochs: int = Field(10, gt=0, description="length of the first cycle; cycles are stretched to fill a stage")
    restart_factor: int = Field(2, ge=1, description="each cycle is so many times as long as the one before")


class TrainingConfig(_Section):
    """The loop."""

    stages: tuple[Stage, ...] = Field((Stage(),), min_length=1)
    batch_size: int = Field(8, gt=0, description="scans per step and device")
    accumulate: int = Field(1, gt=0, description="steps whose gradients are averaged before the optimizer moves")
    select: Literal["best", "last", "target"] = Field(
        "best",
        description="best: the epoch with the highest validation AUROC; last: for a convex head on few validation "
        "patients, where choosing an epoch adds noise; target: validation AUROC plus the information of predictions on "
        "unlabelled target cases, for adaptation",
    )
    patience: int = Field(0, ge=0, description="end a stage after so many epochs without a better one; 0: never")
    ema: float = Field(0.0, ge=0, lt=1, description="judge and keep a moving average of weights, for example 0.999")
    checkpoint_minutes: float = Field(10.0, ge=0, description="most work that a kill can cost; 0: every step is saved")
    gradient_checkpointing: bool = Field(False, description="compute activations twice, keep few: less memory")
    compile: bool = Field(False, description="torch.compile the model: worth it on a GPU, not for few steps")
    clip_norm: float = Field(1.0, gt=0, description="largest gradient norm")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = Field(
        "auto", description="auto: 32-bit on a CPU without bf16 units, mixed on a GPU that has it"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = Field(0, ge=0, description="CPU threads; 0: all cores")
    seed: int = Field(0, ge=0)


class TtaConfig(_Section):
    """Test-time augmentation: the mean of several views is the prediction, in evaluation and deployment alike."""

    views: int = Field(
        5, ge=2, le=64, description="how many, the slices as they are among them: so many times the cost"
    )
    scale: tuple[float, float] = Field(
        (0.9, 1.1), description="smallest and largest zoom; what is drawn is rounded to whole patches"
    )
    crop: bool = Field(True, description="an enlarged picture is cropped anywhere, not only around its middle")
    shift: float = Field(0.02, ge=0, le=0.3, description="largest shift besides, share of the picture's side")
    rotate_deg: float = Field(5.0, ge=0, le=45, description="largest rotation")
    window_jitter: float = Field(0.03, ge=0, lt=1, description="as in data.augment")
    flip: bool = Field(False, description="left-right flips: never for lateralised findings")
    seed: int = Field(0, ge=0, description="of the views, which are the same for all cases")

    @model_validator(mode="after")
    def _scales_in_order(self) -> TtaConfig:
        if not 0.5 <= self.scale[0] <= self.scale[1] <= 2:
            raise ValueError(f"scale: {list(self.scale)}; give smallest and largest zoom, between 0.5 and 2")
        return self


class InferenceConfig(_Section):
    """Prediction."""

    batch_slices: int = Field(32, gt=0, description="slices through the backbone at once: the memory knob")
    tta: TtaConfig | None = Field(None, description="test-time augmentation; null: none. It travels in the bundle")
    ood: Literal["mahalanobis", "knn"] | None = Field(
        "mahalanobis", description="how far a case's features are from those of the training cases is scored so"
    )
    refuse: tuple[Literal["body_part", "kernel", "manufacturer", "contrast", "slice_thickness_mm"], ...] = Field(
        ("body_part",),
        description="a scan whose header is unlike those of all training scans in one of these gets no score; in the "
        "others, a flag; what a header does not say is unlike nothing",
    )
    ood_share: float = Field(
        0.05, gt=0, lt=1, description="share of cases like the training cases that may be flagged as unlike them"
    )


class AttentionConfig(_Section):
    """Relevance maps in the report: how they are judged, and pictures. Pictures show patients."""

    minutes: float = Field(2.0, ge=0, description="time cap of judging maps; the report says how many cases it allowed")
    cases: int = Field(24, ge=3, description="case cap of judging maps")
    slices: int = Field(3, ge=1, description="slices of a case that are explained: those that counted most")
    pictures: int = Field(6, ge=0, description="slices to draw: calls, false alarms and misses, the surest of each")
    seed: int = Field(0, ge=0, description="of the choice of cases")


class PricesConfig(_Section):
    """What owning the model costs: stated, never assumed. Every price that is not 0 should have a source at hand."""

    currency: str = Field("EUR", description="of all prices")
    years: float = Field(5.0, gt=0, description="of use")
    studies_per_year: float = Field(..., gt=0, description="that the model is asked about")
    label_case: float = Field(0.0, ge=0, description="price of labelling one training case")
    machine_hour: float = Field(0.0, ge=0, description="price of an hour of the machine, for training and predicting")
    updates_per_year: float = Field(1.0, ge=0, description="trainings after the first")
    service_year: float = Field(0.0, ge=0, description="licences, hosting and support a year")
    staff_hours_year: float = Field(0.0, ge=0, description="hours of people who watch and update the model, a year")
    staff_hour: float = Field(0.0, ge=0, description="price of such an hour")


class RobustnessConfig(_Section):
    """How AUROC changes with noise, kernel, drift, thickness, metal, motion and attacks."""

    minutes: float = Field(
        3.0, gt=0, description="time for all curves together; each takes as many cases as fit into its share"
    )
    cases: int = Field(60, ge=1, description="most cases of a curve")
    slices: int = Field(4, ge=1, description="most slices of a case that are looked at, evenly spaced, clean or worse")
    seed: int = Field(0, ge=0, description="of the choice of cases and of the noise")


class EvaluationConfig(_Section):
    """Report."""

    bootstrap: int = Field(2000, ge=100, description="patient-clustered bootstrap draws")
    confidence: float = Field(0.95, gt=0.5, lt=1)
    sensitivity: float | None = Field(
        None, gt=0, lt=1, description="operating point: at least this sensitivity on validation; null: Youden's J"
    )
    min_cell: int = Field(10, ge=1, description="cells of the report with fewer patients are greyed")
    tolerance: float = Field(0.1, gt=0, lt=1, description="largest acceptable equalized-odds difference")
    attributes: tuple[str, ...] | None = Field(
        None,
        description="columns to compare groups by; null: site, sex, age_band, and every further column of predictions "
        "with 2 to 12 values",
    )
    crossings: tuple[tuple[str, str], ...] = Field(
        (("site", "sex"),), description="pairs of columns whose combinations are compared as well: [[site, sex]]"
    )
    attention: AttentionConfig | None = Field(
        AttentionConfig(), description="what the model looked at, with slices of patients; null: no maps, no pictures"
    )
    prices: PricesConfig | None = Field(None, description="for the cost of ownership; null: it is not told")
    robustness: RobustnessConfig | None = Field(
        RobustnessConfig(), description="predictions on pictures made worse; null: none"
    )


class Config(_Section):
    """A whole run."""

    preprocessing: Preprocessing = Preprocessing()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def sizes(self) -> set[int]:
        """Sides of all that the model is shown in training, px: slices of every stage, and small crops of them.

        As they are asked for: a model takes the nearest that fits its patch.
        """
        crops = {self.data.views.local_size} if self.objective.pretrains and self.data.views.local else set()
        return {stage.size or self.preprocessing.size for stage in self.training.stages} | crops

    @property
    def learns_until(self) -> float:
        """Progress at which the last stage ends in which the backbone learns; 0 where none is."""
        stages = self.training.stages
        ends = [number for number, stage in enumerate(stages, 1) if stage.trainable != "head"]
        return sum(stage.epochs for stage in stages[: max(ends, default=0)]) / sum(stage.epochs for stage in stages)

    @model_validator(mode="after")
    def _folds_hold_out(self) -> Config:
        if self.data.folds == 1:
            raise ValueError("data.folds: 1 fold holds nothing out; give 0 (one held-out split) or 2 and more")
        return self

    @model_validator(mode="after")
    def _ends_at_full_size(self) -> Config:
        last = self.training.stages[-1].size
        if last not in (None, self.preprocessing.size):
            raise ValueError(
                f"training.stages: the last one trains at {last} px and the model is used at preprocessing.size "
                f"{self.preprocessing.size}; leave out its size"
            )
        return self

    @model_validator(mode="after")
    def _has_an_estimate(self) -> Config:
        if self.objective.name == "mmd" and self.objective.unbiased and self.training.batch_size == 1:
            raise ValueError(
                "objective.unbiased compares cases within each side: training.batch_size must be 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _acceleration_fits(self) -> Config:
        if self.objective.acceleration is None:
            return self
        if not self.model.trunk_learns or all(stage.trainable == "head" for stage in self.training.stages):
            raise ValueError(
                "objective.acceleration saves what the backbone costs while it learns, and it is frozen (model.tuning, "
                "training.stages): leave it out, or let the backbone learn"
            )
        if self.training.patience:
            raise ValueError(
                "training.patience may end a training before it has seen whole slices again: it must be 0 with "
                "objective.acceleration"
            )
        whole, latest = self.objective.acceleration.schedule[-1].from_progress, LATEST_UNCOMPRESSED * self.learns_until
        if whole > latest + 1e-9:
            raise ValueError(
                f"objective.acceleration: slices are whole from {whole:g} of the training on, and the backbone learns "
                f"until {self.learns_until:g} (training.stages): let the last step begin at {latest:.3g} or before"
            )
        for size in self.sizes:
            for step in self.objective.acceleration.schedule:
                if step.patch is not None and size % step.patch:
                    raise ValueError(
                        f"objective.acceleration: patches of {step.patch} px do not divide slices or crops of {size} px"
                    )
        return self

    @model_validator(mode="after")
    def _one_split(self) -> Config:
        if self.data.target_sites and (self.data.folds or self.data.holdout_sites):
            raise ValueError("data.target_sites makes a split of its own: leave out data.folds and data.holdout_sites")
        if self.data.folds and self.data.holdout_sites:
            raise ValueError("data.holdout_sites makes a split of its own: leave out data.folds")
        return self

    @model_validator(mode="after")
    def _pretrains(self) -> Config:
        """Without labels no epoch is better than another, and views must be those that the objective compares."""
        name, views = self.objective.name, self.data.views
        if not self.objective.pretrains:
            return self
        if self.data.folds or self.data.holdout_sites or self.data.target_sites:
            raise ValueError(f"objective.name {name} has one split: leave out data.folds, holdout_sites, target_sites")
        if self.model.tuning != "full" or all(stage.trainable == "head" for stage in self.training.stages):
            raise ValueError(
                f"objective.name {name} trains the backbone: set model.tuning=full, and trainable=all in a stage"
            )
        if self.training.select != "last" or self.training.patience:
            raise ValueError(f"objective.name {name} keeps the last epoch: set training.select=last, patience=0")
        if self.data.sampling == "balanced":
            raise ValueError(f"objective.name {name} knows no labels to balance: set data.sampling=shuffle")
        if name == "dino" and self.training.ema:
            raise ValueError("objective.name dino keeps its teacher, which is an average already: set training.ema=0")
        if name == "mae" and self.training.compile:
            raise ValueError(
                "objective.name mae shows the encoder some patches only, past what is compiled: set "
                "training.compile=false"
            )
        if name != "mae" and views.count != 2:
            raise ValueError(f"objective.name {name} compares two views of a slice: set data.views.count=2")
        steps = self.objective.acceleration.schedule if self.objective.acceleration else ()
        if name == "mae" and any(step.patch is not None for step in steps):
            raise ValueError("objective.name mae tells pixels of patches of one size: accelerate it by `keep` alone")
        if name != "dino" and views.local:
            raise ValueError(f"objective.name {name} has no use for small crops: set data.views.local=0")
        if name in ("simclr", "mocov3") and self.training.batch_size < 3:  # of 2, the last batch may be a single case
            raise ValueError(f"objective.name {name} compares patients: training.batch_size must be 3 or more")
        return self

    def to_yaml(self) -> str:
        """The config as resolved, every key present."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


GRIDS: Mapping[str, Mapping[str, Sequence[float]]] = MappingProxyType(
    {
        "rates": {"training.stages.-1.lr": (1e-4, 3e-4, 1e-3), "training.stages.-1.weight_decay": (0.01, 0.05)},
        "strength": {"objective.strength": (0.0, 0.1, 0.3, 1.0, 3.0)},
    }
)
"""Name -> config key -> values; every combination is a point, beside the settings as they are. -1 is the last stage."""


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs that come with medvit (inside the wheel, or beside the package in a checkout)."""
    here = Path(__file__).resolve().parent
    folder = next((d for d in (here / "configs", here.parent / "configs") if d.is_dir()), here / "configs")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: str | Path | None = None, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a YAML file (or a shipped config by name), apply `section.key=value` overrides, and check the result.

    Args:
        source: path, or name of a shipped config; None is `baseline`.
        overrides: `section.key=value`, the value in YAML; list items by index (`training.stages.0.lr=1e-4`). Below a
            section that is null, it begins with its defaults (`inference.tta.views=9`).

    Raises:
        UsageError: no such file, no YAML, unknown key (with the nearest name), or a value out of range.
    """
    config = _validate(_read_yaml(_find(source)))
    if not overrides:
        return config
    tree = config.model_dump(mode="json")  # with the defaults in place, so that an override can reach into them
    for override in overrides:
        _apply(tree, override)
    return _validate(tree)


def override(config: Config, settings: Mapping[str, Any]) -> Config:
    """The same with some values changed, each by its `section.key`.

    Raises:
        UsageError: unknown key, or a value out of range.
    """
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        _apply(tree, f"{key}={value}")
    return _validate(tree)


def setting(config: Config, key: str) -> Any:
    """What a config holds at a `section.key` that it has."""
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _validate(tree: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error)) from None


def _find(source: str | Path | None) -> Path:
    path = Path(source if source is not None else "baseline")
    shipped = shipped_configs()
    if path.is_file():
        return path
    name = path.stem
    if name in shipped and path.parent in (Path(), Path("configs")):
        return shipped[name]
    raise UsageError(f"config {str(source)!r}: no such file. Shipped configs: {', '.join(shipped)}.")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path.name}: not readable as YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(
            f"config {path.name}: expected sections ({', '.join(Config.model_fields)}), saw a {type(tree).__name__}."
        )
    return tree


def _parse_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text: it wants a dot
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r}: expected section.key=value, for example training.batch_size=4.")
    node: Any = tree
    *parents, last = key.split(".")
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else _entered(node, part)
        node[int(last) if isinstance(node, list) else last] = _parse_value(text)
    except (ValueError, IndexError, TypeError, AttributeError):
        raise UsageError(f"{override!r}: there is no such place in the config.{_hint(key.split('.'))}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{override!r}: the value is not readable as YAML: {error}") from None


def _entered(node: dict[str, Any], part: str) -> Any:
    """What is at `part`; a section that is null or not there begins empty, to be filled with its defaults."""
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        where = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown config key {'.'.join(where)!r}.{_hint(where)}")
        else:
            # a rule about several keys names them itself; what it saw is the whole section
            whole = item["type"] == "value_error" and isinstance(item["input"], dict)
            seen = "" if whole else f" (saw {item['input']!r})"
            lines.append(f"config key {'.'.join(where) or 'config'!r}: {item['msg']}{seen}.")
    return "\n".join(dict.fromkeys(lines))


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        for candidate in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += _known_keys(candidate, f"{prefix}{name}.")
    return keys


def _hint(where: list[str]) -> str:
    """Nearest known key: first below the same section, then by last name anywhere (a key in the wrong section)."""
    path = ".".join(part for part in where if not part.isdigit())
    known = _known_keys(Config)
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if not near:
        leaf = path.rsplit(".", 1)[-1]
        leaves = {key.rsplit(".", 1)[-1]: key for key in known}
        near = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    return f" Did you mean {near[0]!r}?" if near else f" Known sections: {', '.join(Config.model_fields)}."
