from lscollapse.cli.app import main

main()
