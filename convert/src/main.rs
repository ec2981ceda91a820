//! The program `pipit-convert`.

fn main() {}
