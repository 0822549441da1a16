"""Many runs: ``python sweep.py [plan|launch|status|results] experiment=main_table`` or ``... KEY=V1,V2``"""

from hmn.sweeps.cli import main

if __name__ == "__main__":
    main()
