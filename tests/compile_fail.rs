//! The most likely mistakes do not compile. Where the language allows it, the message of the compiler names the
//! remedy. The test compares parts of the messages, because compilers differ in the rest.

use std::{env, fs, path::Path, process::Command};

/// The files in `compile_fail/`, each with the parts that the message of the compiler has to contain.
const MISTAKES: [(&str, &[&str]); 5] = [
    // A bound of axum on types of other crates is missing, so this crate cannot add to the message.
    ("server_without_respond", &["Infallible", "Box<dyn std::error::Error"]),
    (
        "respond_without_http",
        &[
            "`Respond` cannot convert a rejection into",
            "do not change the protocol of the layer from `Http`",
            ".respond_with(",
        ],
    ),
    (
        "http_over_other_types",
        &["`Http` cannot classify calls with the results `u32`", ".classify(", ".per_response()"],
    ),
    // The compiler has its own message for a closure of another signature: it states both signatures.
    ("closure_for_other_types", &["type mismatch in function arguments", "&'a std::io::Error"]),
    ("service_not_clone", &["`Once` cannot be cloned", "tower::buffer::BufferLayer"]),
];

#[test]
fn errors_of_the_compiler_state_the_remedy() {
    let house = Path::new(env!("CARGO_MANIFEST_DIR"));
    let project = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compile_fail");
    fs::create_dir_all(&project).unwrap();
    fs::copy(house.join("Cargo.lock"), project.join("Cargo.lock")).unwrap();
    let mut manifest = format!(
        r#"
[package]
name = "mistakes"
version = "0.0.0"
edition = "2024"
publish = false
[workspace]
[dependencies]
buttress = {{ path = {house:?}, default-features = false, features = ["breaker", "limit"] }}
axum = {{ version = "0.8", default-features = false }}
http = "1"
tower = "0.5"
"#
    );
    for (name, _) in MISTAKES {
        let path = house.join("tests/compile_fail").join(name).with_extension("rs");
        manifest += &format!("[[bin]]\nname = {name:?}\npath = {path:?}\n");
    }
    fs::write(project.join("Cargo.toml"), manifest).unwrap();

    for (name, remedy) in MISTAKES {
        // The dependencies have been fetched for the tests of this crate.
        let told = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["check", "--offline", "--quiet", "--color", "never", "--bin", name])
            .current_dir(&project)
            .env("CARGO_TARGET_DIR", project.join("target"))
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&told.stderr);
        assert!(!told.status.success(), "{name} compiles");
        // `dyn` was printed in parentheses by older compilers.
        let words = message.replace("(dyn", "dyn");
        for part in remedy {
            assert!(words.contains(part), "{name}: {part:?} is not in\n{message}");
        }
    }
}
