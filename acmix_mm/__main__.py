"""``python -m acmix_mm COMMAND``; without a command, lists all of them."""

from acmix_mm.commands import main

if __name__ == '__main__':
    main()
