from lscollapse.cli.app import program

program()
