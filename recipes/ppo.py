"""Proximal policy optimization with concepts as rewards, for whole completions or token by token.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/ppo.py \\
        --config recipes/pay_for_a_concept/ppo/config_dense.yaml

Columns of the data: `prompt`. Everything but the `interp:` section is TRL's own or of `PPOConfig`; unknown keys are refused. At
the end the policy is saved without its value function; checkpoints hold both.
"""

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from interp_rlhf import InterpPPOTrainer, PPOConfig
from interp_rlhf.recipe import InterpArguments, datasets_of, model_of, resume_of

ARGUMENTS = (ScriptArguments, PPOConfig, ModelConfig, InterpArguments)


def main() -> None:
    parser = TrlParser(ARGUMENTS, description=__doc__)
    script, args, model, ours = parser.parse_args_and_config()
    trainer = InterpPPOTrainer(
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
