//! The program `pipit`.

fn main() {}
