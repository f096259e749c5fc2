"""How is something run or published again? By a plan that is carried out, resumed, compared, or rebuilt from."""
