"""What a reader has to know to read the numbers rightly: the last section of every report."""

NOTES: tuple[tuple[str, str], ...] = (
    (
        "A rising concept reward is not evidence of better behaviour",
        "It shows that the policy found text on which the readout scores higher. Whether that text is better has to "
        "come from something that no part of the reward has seen: the independent measure, the samples side by "
        "side, people.",
    ),
    (
        "No reward is un-gameable",
        "A probe, a latent or a verifier is a proxy. Enough optimization finds where it and the intended behaviour "
        "part. A report without signs of that means that none were seen with these measures, up to this step.",
    ),
    (
        "KL",
        "An estimate, on sampled tokens, of how far the policy's distribution is from the reference's. It counts "
        "distance, not direction: the same KL can be an improvement or a collapse. Compare arms at equal KL before "
        "saying that one reward works better.",
    ),
    (
        "Entropy and clipped ratio",
        "Entropy that falls towards zero means that the policy repeats itself. The clipped ratio is the share of "
        "completions cut off at the length limit: near 1, every score is a score of unfinished text, and the reward "
        "may simply be paying for length.",
    ),
    (
        "Holdout monitors",
        "Probes that the training never optimized against. They fall behind the reward when it is gamed in a way that "
        "they can see. They share the model, and often the data, with the reward's probe, so agreement between them "
        "is weak evidence; disagreement is strong. On a model that has drifted a monitor can itself stop working: "
        "its AUROC on labelled texts says whether it still reads the concept.",
    ),
    (
        "Drift is drift on a text",
        "Every drift number belongs to the texts on which it was measured; on other texts it can be larger or smaller.",
    ),
    (
        "CKA is blind to rotation",
        "CKA compares the geometry of activations and does not see a rotation or a common scaling. A CKA of 1 can go "
        "with a probe that no longer works. Cosine and relative norm compare activations one by one and do see it.",
    ),
    (
        "One run is one sample",
        "Differences between arms with one seed each, or without a control arm, may be noise.",
    ),
)
