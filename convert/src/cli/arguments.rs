//! What of a command line is written into the result: the options that shape it, and nothing of the user's machine.

use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

/// Options that leave the bytes of a result as they are.
const NOT_RECORDED: &[&str] = &[
    "output",
    "force",
    "dry_run",
    "no_card",
    "modelfile",
    "threads",
    "verify",
    "max_kl",
    "verify_ctx",
    "verify_chunks",
    "json",
    "verbose",
    "quiet",
];

/// The subcommand and its options as they were given, in the order in which `--help` lists them. Of a value with
/// slashes the part after the last one is kept.
pub(super) fn recorded(command: &Command, matches: &ArgMatches) -> Vec<String> {
    let Some((name, matches)) = matches.subcommand() else {
        return Vec::new();
    };
    let mut out = vec![name.to_owned()];
    let Some(command) = command.find_subcommand(name) else {
        return out;
    };
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let given = matches.try_contains_id(id).is_ok()
            && matches.value_source(id) == Some(ValueSource::CommandLine)
            && !NOT_RECORDED.contains(&id);
        if !given {
            continue;
        }
        let option = arg.get_long().map(|long| format!("--{long}"));
        if !arg.get_action().takes_values() {
            out.extend(option);
            continue;
        }
        for value in matches.get_raw(id).into_iter().flatten() {
            out.extend(option.clone());
            out.push(last_part(&value.to_string_lossy()).to_owned());
        }
    }
    out
}

fn last_part(value: &str) -> &str {
    let value = value.trim_end_matches('/');
    value.rsplit('/').next().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::Cli;
    use super::*;

    fn of(line: &str) -> String {
        let matches = Cli::command().try_get_matches_from(line.split(' ')).unwrap();
        recorded(&Cli::command(), &matches).join(" ")
    }

    #[test]
    fn options_are_recorded_in_one_order_and_folders_are_not() {
        let line = "pipit-convert model --force -q --adapter /home/ann/run=0.5 --type=q4_k_m /home/ann/smollm2/ -o \
                    /home/ann/x.gguf --adapter b --pure --json";
        assert_eq!(
            of(line),
            "model smollm2 --type q4_k_m --pure --adapter run=0.5 --adapter b"
        );
        assert_eq!(of("pipit-convert model . -o x.gguf"), "model .");
    }
}
