from tests.instructions.report import main

main()
