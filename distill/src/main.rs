//! The program `pipit-distill`.

fn main() {}
