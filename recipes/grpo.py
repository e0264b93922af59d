"""Group relative policy optimization with concepts as rewards and in the loss.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/grpo.py \\
        --config recipes/pay_for_a_concept/grpo/config_warmth.yaml

Columns of the data: `prompt`. Everything but the `interp:` section is TRL's own; unknown keys are refused.
"""

from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from interp_rlhf import InterpGRPOTrainer
from interp_rlhf.recipe import InterpArguments, datasets_of, model_of, resume_of

ARGUMENTS = (ScriptArguments, GRPOConfig, ModelConfig, InterpArguments)


def main() -> None:
    parser = TrlParser(ARGUMENTS, description=__doc__)
    script, args, model, ours = parser.parse_args_and_config()
    trainer = InterpGRPOTrainer(
        model=model_of(model, args),
        reward_funcs=ours.rewards(),
        args=args,
        peft_config=get_peft_config(model),
        **datasets_of(script),
        **ours.attach_keywords(),
    )
    trainer.train(resume_from_checkpoint=resume_of(args))
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
