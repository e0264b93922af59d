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

LATENT_NOTES: tuple[tuple[str, str], ...] = (
    (
        "The highest activations are the exception",
        "They are the clearest texts and the rarest. Most of the tokens on which a latent is on lie lower, as its histogram "
        "says, and may be about something else. Precision and recall on labelled text count them all; near misses show what "
        "the latent does not mean.",
    ),
    (
        "A label is a guess",
        "Whoever named a latent, a person, a model or a rule, saw some of its contexts. The name holds as far as it was tested "
        "on text that the namer had not seen.",
    ),
    (
        "Promoted tokens go straight to the output",
        "They say what the latent would do if no later layer came between. For a late latent that is near what it does, for an "
        "early one it may be noise.",
    ),
    (
        "A latent that separates is not yet a find",
        "A dense probe and a bag of words may separate better, and a random dictionary of the same size holds latents that "
        "separate too. Only what exceeds all of these on held-out text is due to the training of the autoencoder.",
    ),
    (
        "FVU, L0 and dead latents are of these texts",
        "FVU is the share of the activation's variance that the autoencoder misses: 0 is perfect, 1 is no better than the mean. "
        "A latent that is dead here may be on elsewhere. The first token of each context and tokens of "
        "outstanding norm are left out of every number: they are attention sinks.",
    ),
)

PATCHING_NOTES: tuple[tuple[str, str], ...] = (
    (
        "Attribution is a slope, patching is a step",
        "Attribution takes the gradient in the corrupt run for the whole way to the clean activation. Where the model bends, as "
        "in the first MLP, it can be far off. The exact effects next to it say how far, and on how many sites.",
    ),
    (
        "Effects do not add up",
        "Each effect is of one site alone. A later module can undo or repeat what an earlier one does, so the effects of all "
        "sites may sum to more or less than the difference of the two runs.",
    ),
    (
        "It acts on these prompts",
        "Another contrast, template or answer can take another path. Sites were chosen on some pairs and measured on others of "
        "the same kind; that guards against chance, not against a template.",
    ),
)
