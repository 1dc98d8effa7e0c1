"""The names of torch that manualgrad replaces or rebinds, by module (see `manualgrad.rebinding`).

A name of torch.nn.modules is a method. `rebinding.check` compares the table with the installed torch at import;
`tests/test_rebinding.py` shows what to add and to remove.
"""

REBOUND_NAMES: dict[str, str] = {
    "torch": """
        abs adaptive_max_pool1d affine_grid_generator baddbmm binary_cross_entropy_with_logits bmm
        clamp_min cosine_embedding_loss ctc_loss embedding embedding_bag grid_sampler gru gru_cell
        hinge_embedding_loss kl_div lstm lstm_cell margin_ranking_loss max_pool1d max_pool1d_with_indices
        max_pool2d max_pool3d minimum poisson_nll_loss pow rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
        sigmoid sigmoid_ tanh tanh_ triplet_margin_loss
    """,
    "torch._C._nn": """
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
        binary_cross_entropy cross_entropy_loss fractional_max_pool2d fractional_max_pool3d huber_loss
        l1_loss log_sigmoid max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d
        mse_loss multi_margin_loss multilabel_margin_loss nll_loss_nd smooth_l1_loss soft_margin_loss
    """,
    "torch.backends.mha": "get_fastpath_enabled",
    "torch.nn.functional": """
        _adaptive_max_pool1d _adaptive_max_pool2d _adaptive_max_pool3d _fractional_max_pool2d
        _fractional_max_pool3d _in_projection _in_projection_packed _list_with_default _max_pool1d
        _max_pool2d _max_pool3d _threshold adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool1d_with_indices adaptive_max_pool2d
        adaptive_max_pool2d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices affine_grid
        alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear binary_cross_entropy
        binary_cross_entropy_with_logits celu channel_shuffle conv1d conv2d conv3d conv_tbc
        conv_transpose1d conv_transpose2d conv_transpose3d cosine_embedding_loss cosine_similarity
        cross_entropy ctc_loss dropout dropout1d dropout2d dropout3d elu embedding embedding_bag
        feature_alpha_dropout fold fractional_max_pool2d fractional_max_pool2d_with_indices
        fractional_max_pool3d fractional_max_pool3d_with_indices gaussian_nll_loss gelu glu grid_sample
        group_norm grouped_mm gumbel_softmax hardshrink hardsigmoid hardswish hardtanh hinge_embedding_loss
        huber_loss instance_norm interpolate kl_div l1_loss layer_norm leaky_relu linear
        linear_cross_entropy local_response_norm log_softmax lp_pool1d lp_pool2d lp_pool3d
        margin_ranking_loss max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
        max_pool3d max_pool3d_with_indices max_unpool1d max_unpool2d max_unpool3d mish mse_loss
        multi_head_attention_forward multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss
        native_channel_shuffle nll_loss normalize pad pairwise_distance pdist pixel_shuffle pixel_unshuffle
        poisson_nll_loss prelu relu relu6 rms_norm rrelu scaled_dot_product_attention selu sigmoid silu
        smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink softsign tanh tanhshrink
        triplet_margin_loss triplet_margin_with_distance_loss unfold upsample upsample_bilinear
        upsample_nearest
    """,
    "torch.nn.modules.activation": """
        CELU.forward ELU.forward GELU.forward GLU.forward Hardshrink.forward Hardsigmoid.forward
        Hardswish.forward Hardtanh.forward LeakyReLU.forward LogSigmoid.forward LogSoftmax.forward
        Mish.forward MultiheadAttention.forward PReLU.forward RReLU.forward ReLU.forward SELU.forward
        SiLU.forward Sigmoid.forward Softmax.forward Softmax2d.forward Softmin.forward Softplus.forward
        Softshrink.forward Softsign.forward Tanh.forward Tanhshrink.forward Threshold.forward
    """,
    "torch.nn.modules.adaptive": """
        AdaptiveLogSoftmaxWithLoss.__init__ AdaptiveLogSoftmaxWithLoss._get_full_log_prob
        AdaptiveLogSoftmaxWithLoss.forward
    """,
    "torch.nn.modules.batchnorm": "SyncBatchNorm.forward _BatchNorm.forward",
    "torch.nn.modules.channelshuffle": "ChannelShuffle.forward",
    "torch.nn.modules.conv": """
        Conv1d._conv_forward Conv2d._conv_forward Conv3d._conv_forward ConvTranspose1d.forward
        ConvTranspose2d.forward ConvTranspose3d.forward
    """,
    "torch.nn.modules.distance": "CosineSimilarity.forward PairwiseDistance.forward",
    "torch.nn.modules.dropout": """
        AlphaDropout.forward Dropout.forward Dropout1d.forward Dropout2d.forward Dropout3d.forward
        FeatureAlphaDropout.forward
    """,
    "torch.nn.modules.fold": "Fold.forward Unfold.forward",
    "torch.nn.modules.instancenorm": "_InstanceNorm._apply_instance_norm",
    "torch.nn.modules.linear": "Bilinear.forward Linear.forward",
    "torch.nn.modules.loss": """
        BCELoss.forward BCEWithLogitsLoss.forward CTCLoss.forward CosineEmbeddingLoss.forward
        CrossEntropyLoss.forward GaussianNLLLoss.forward HingeEmbeddingLoss.forward HuberLoss.forward
        KLDivLoss.forward L1Loss.forward LinearCrossEntropyLoss.__init__ LinearCrossEntropyLoss.forward
        MSELoss.forward MarginRankingLoss.forward MultiLabelMarginLoss.forward
        MultiLabelSoftMarginLoss.forward MultiMarginLoss.forward NLLLoss.forward PoissonNLLLoss.forward
        SmoothL1Loss.forward SoftMarginLoss.forward TripletMarginLoss.forward
        TripletMarginWithDistanceLoss.__init__ TripletMarginWithDistanceLoss.forward
    """,
    "torch.nn.modules.normalization": """
        CrossMapLRN2d.forward GroupNorm.forward LayerNorm.forward LocalResponseNorm.forward RMSNorm.forward
    """,
    "torch.nn.modules.padding": """
        _CircularPadNd.forward _ConstantPadNd.forward _ReflectionPadNd.forward _ReplicationPadNd.forward
    """,
    "torch.nn.modules.pixelshuffle": "PixelShuffle.forward PixelUnshuffle.forward",
    "torch.nn.modules.pooling": """
        AdaptiveAvgPool1d.forward AdaptiveAvgPool2d.forward AdaptiveAvgPool3d.forward
        AdaptiveMaxPool1d.forward AdaptiveMaxPool2d.forward AdaptiveMaxPool3d.forward AvgPool1d.forward
        AvgPool2d.forward AvgPool3d.forward FractionalMaxPool2d.forward FractionalMaxPool3d.forward
        LPPool1d.forward LPPool2d.forward LPPool3d.forward MaxPool1d.forward MaxPool2d.forward
        MaxPool3d.forward MaxUnpool1d.forward MaxUnpool2d.forward MaxUnpool3d.forward
    """,
    "torch.nn.modules.rnn": """
        GRU.forward GRUCell.forward LSTM.forward LSTMCell.forward RNN.forward RNNCell.forward
    """,
    "torch.nn.modules.sparse": "Embedding.forward EmbeddingBag.forward",
    "torch.nn.modules.transformer": """
        Transformer.__init__ TransformerDecoderLayer.__init__ TransformerDecoderLayer.__setstate__
        TransformerEncoder.__init__ TransformerEncoder.forward TransformerEncoderLayer.__init__
        TransformerEncoderLayer.__setstate__ TransformerEncoderLayer.forward _get_activation_fn
    """,
    "torch.nn.modules.upsampling": "Upsample.forward",
}

SINCE: dict[str, str] = {
    "torch.nn.functional.linear_cross_entropy": "2.13",
    "torch.nn.modules.loss.LinearCrossEntropyLoss.__init__": "2.13",
    "torch.nn.modules.loss.LinearCrossEntropyLoss.forward": "2.13",
}
"""The version of torch that has a name first, where it is not the oldest that is supported."""
