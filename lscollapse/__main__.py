from lscollapse.cli import main

main()
