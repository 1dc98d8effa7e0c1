"""The gradients. Each file reads top to bottom: derivation, rule, function, registration."""

from manualgrad.ops import activation as activation
from manualgrad.ops import arithmetic as arithmetic
from manualgrad.ops import attention as attention
from manualgrad.ops import classification as classification
from manualgrad.ops import convolution as convolution
from manualgrad.ops import ctc as ctc
from manualgrad.ops import distance as distance
from manualgrad.ops import dropout as dropout
from manualgrad.ops import elementwise as elementwise
from manualgrad.ops import embedding as embedding
from manualgrad.ops import indexing as indexing
from manualgrad.ops import joining as joining
from manualgrad.ops import linear as linear
from manualgrad.ops import linear_cross_entropy as linear_cross_entropy
from manualgrad.ops import loss as loss
from manualgrad.ops import margin as margin
from manualgrad.ops import normalization as normalization
from manualgrad.ops import padding as padding
from manualgrad.ops import pooling as pooling
from manualgrad.ops import products as products
from manualgrad.ops import recurrent as recurrent
from manualgrad.ops import reduction as reduction
from manualgrad.ops import resampling as resampling
from manualgrad.ops import softmax as softmax
from manualgrad.ops import views as views
