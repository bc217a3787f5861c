//! The `fleecefs` command; see [`fleecefs::cli`].

fn main() -> std::process::ExitCode {
    fleecefs::cli::main()
}
