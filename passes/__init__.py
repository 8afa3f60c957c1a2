"""The techniques, in the order in which they are offered. A new one is a file here and a line below."""

from lowrank_onnx.base import Pass
from lowrank_onnx.passes.bayesian import Bayesian
from lowrank_onnx.passes.blast import BlastPass
from lowrank_onnx.passes.block import Block
from lowrank_onnx.passes.channel import Channel
from lowrank_onnx.passes.cp import CP
from lowrank_onnx.passes.embedding import Embedding
from lowrank_onnx.passes.feedforward import Feedforward
from lowrank_onnx.passes.grouped_embedding import GroupedEmbedding
from lowrank_onnx.passes.heads import Heads
from lowrank_onnx.passes.hierarchical import Hierarchical
from lowrank_onnx.passes.kronecker import Kronecker
from lowrank_onnx.passes.logits import Logits
from lowrank_onnx.passes.monarch import Monarch
from lowrank_onnx.passes.nmf import NMF
from lowrank_onnx.passes.nystrom import Nystrom
from lowrank_onnx.passes.recurrent_cell import RecurrentCell
from lowrank_onnx.passes.recurrent_input import RecurrentInput
from lowrank_onnx.passes.recurrent_stored import RecurrentStored
from lowrank_onnx.passes.recurrent_units import RecurrentUnits
from lowrank_onnx.passes.shared_input import SharedInput
from lowrank_onnx.passes.shared_layers import SharedLayers
from lowrank_onnx.passes.spatial import Spatial
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.passes.tensor_train import TensorTrain
from lowrank_onnx.passes.tied import Tied
from lowrank_onnx.passes.tucker import Tucker
from lowrank_onnx.passes.whole_heads import WholeHeads

PASSES: tuple[type[Pass], ...] = (
    SVD,
    Logits,
    SharedInput,
    SharedLayers,
    Feedforward,
    Heads,
    WholeHeads,
    RecurrentInput,
    RecurrentStored,
    RecurrentCell,
    RecurrentUnits,
    Spatial,
    Channel,
    Tucker,
    CP,
    TensorTrain,
    Embedding,
    GroupedEmbedding,
    Tied,
    NMF,
    Bayesian,
    Nystrom,
    Block,
    Monarch,
    Kronecker,
    Hierarchical,
    BlastPass,
)

__all__ = ["PASSES"]
