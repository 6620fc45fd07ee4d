//! What holds for every command: help, lists as JSON, progress, readers that go away, interrupts, output files.

use crate::common::{self, Home, skipped};

#[test]
fn completions_and_manual_pages_come_out_of_the_program() {
    let home = Home::new();
    let run = |arguments: &str| {
        let output = std::process::Command::new(common::GRAPHDRIVER).args(arguments.split(' ')).output().unwrap();
        assert!(output.status.success(), "{arguments}");
        String::from_utf8(output.stdout).unwrap()
    };
    for (shell, mark) in
        [("bash", "complete -F _graphdriver"), ("zsh", "#compdef graphdriver"), ("fish", "complete -c graphdriver")]
    {
        let script = run(&format!("completions {shell}"));
        assert!(script.contains(mark) && script.contains("storage-driver"), "{shell}");
    }
    assert!(run("man").contains(".TH graphdriver 1"));
    let dir = home.path().join("man");
    run(&format!("man -o {}", dir.display()));
    for page in ["graphdriver.1", "graphdriver-load.1", "graphdriver-image-prune.1", "graphdriver-events.1"] {
        assert!(std::fs::read_to_string(dir.join(page)).unwrap().contains(".SH"), "{page}");
    }
    assert!(run("--version").starts_with("graphdriver "));
}

/// Every command tells of itself, and the overview is what the README quotes.
#[test]
fn every_command_has_a_help_text() {
    let help = |arguments: &[&str]| {
        let output = std::process::Command::new(common::GRAPHDRIVER).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
    };
    let (code, overview) = help(&["--help"]);
    assert_eq!(code, Some(0));
    let commands: Vec<_> = overview
        .lines()
        .skip_while(|l| *l != "Commands:")
        .skip(1)
        .take_while(|l| !l.is_empty())
        .filter(|l| l.starts_with("  ") && !l.starts_with("   "))
        .map(|l| l.split_whitespace().next().unwrap())
        .collect();
    for command in
        "drivers info load save import export images inspect history tag rmi image create ps rename rm diff cp \
                    commit mount umount mounts df events completions man"
            .split_whitespace()
    {
        assert!(commands.contains(&command), "{command}: {commands:?}");
        let (code, text) = help(&[command, "--help"]);
        assert_eq!(code, Some(0));
        assert!(text.contains(&format!("Usage: graphdriver {command}")), "{text}");
        assert!(text.lines().next().unwrap().len() > 10, "{command} says what it is for: {text}");
    }
    let (code, text) = help(&[]);
    assert_eq!((code, text.contains("Commands:")), (Some(2), true), "{text}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    needs_root!("a_reader_that_goes_away_is_no_error");
    let home = Home::with_container();
    for command in
        ["images", "--format json inspect demo", "events", "--help", "diff c", "completions bash", "man", "df -v"]
    {
        // `:` reads nothing at all.
        home.ok(&format!("set +o pipefail; graphdriver {command} | head -c 1 > /dev/null; graphdriver {command} | :"));
    }
}

/// `set -o pipefail; graphdriver save … | …` took half an archive for a whole one.
#[test]
fn an_archive_cut_short_by_its_reader_is_an_error() {
    needs_root!("an_archive_cut_short_by_its_reader_is_an_error");
    let home = Home::with_container();
    for command in ["export c", "save demo", "cp c:/ -"] {
        home.fails(1, &format!("set -o pipefail; graphdriver {command} | (exec <&-; sleep 0.5)"), &["went away"]);
    }
}

#[test]
fn progress_is_for_terminals_only() {
    needs_root!("progress_is_for_terminals_only");
    let home = Home::new();
    // A source that takes its time: a bar need not show for what is over at once.
    let slow = "(head -c 1000 rootfs.tar; sleep 0.5; tail -c +1001 rootfs.tar) | graphdriver import -";
    let terminal = home.ok(&format!("script -qec '{slow}' /dev/null"));
    assert!(terminal.contains("B/s") && terminal.contains("sha256:"), "{terminal:?}");
    let redirected = home.ok(&format!("script -qec '{slow} 2> err' /dev/null; cat err"));
    assert!(!redirected.contains("B/s"), "only standard error counts: {redirected:?}");
    home.ok(slow);
}

#[test]
fn every_list_is_valid_json() {
    needs_root!("every_list_is_valid_json");
    let home = Home::with_container();
    for list in
        ["drivers", "images", "images -a --digests", "history demo", "ps", "ps --size", "diff c", "mounts", "df"]
    {
        assert!(home.json(list).is_array(), "{list}");
    }
    for document in ["info", "df -v", "load -i demo.tar", "commit c new", "create demo", "rmi new", "import rootfs.tar"]
    {
        home.json(document);
    }
    assert!(home.ok("GRAPHDRIVER_FORMAT=json graphdriver ps").starts_with('['));
}

#[test]
fn where_the_size_is_known_progress_is_a_bar() {
    needs_root!("where_the_size_is_known_progress_is_a_bar");
    let home = Home::new();
    // Long enough for a bar to move.
    home.ok("truncate -s 300M big; tar cf big.tar big");
    for command in ["import big.tar big:1", "save -o saved.tar big:1", "load -i saved.tar"] {
        let terminal = home.ok(&format!("script -qec 'graphdriver {command}' /dev/null"));
        assert!(terminal.contains("/300.0") && terminal.contains('█'), "{command}: {terminal:?}");
        if command.starts_with("save") {
            home.ok("graphdriver rmi big:1");
        }
    }
}

#[test]
fn an_interrupt_ends_a_read_from_a_pipe_that_sends_nothing() {
    needs_root!("an_interrupt_ends_a_read_from_a_pipe_that_sends_nothing");
    let home = Home::with_container();
    home.ok("mkfifo pipe; graphdriver info > before");
    for command in ["load < pipe", "load -i pipe", "import - < pipe", "import pipe", "cp - c:/etc < pipe"] {
        for (signal, writer) in [("INT", "head -c 1000 demo.tar >&3"), ("TERM", ":")] {
            // The writer is this shell itself, which holds the pipe open and sends no more.
            let script = format!(
                "exec 3<> pipe; {writer}; graphdriver {command} 2> said & pid=$!; sleep 0.5
                kill -{signal} $pid; date +%s%N > killed; wait $pid && code=0 || code=$?
                late=$((($(date +%s%N) - $(cat killed)) / 1000000)); echo $code $((late < 10000)); cat said"
            );
            let told = home.ok(&script);
            assert!(told.starts_with("130 1\n") && told.contains("interrupted"), "{command} {signal}: {told}");
        }
    }
    home.ok("graphdriver info > after; diff <(grep -v Free: before) <(grep -v Free: after)");
    // Without anybody at the other end not even opening it ends.
    let alone = "graphdriver load -i pipe & pid=$!; sleep 0.5; kill $pid; wait $pid";
    home.fails(130, alone, &["interrupted"]);
}

#[test]
fn an_output_file_is_made_as_other_programs_make_it() {
    needs_root!("an_output_file_is_made_as_other_programs_make_it");
    let home = Home::with_container();
    let made = |before: &str, path: &str| {
        home.ok(&format!(
            "{before}; graphdriver save -o {path} demo; graphdriver export -o {path}.2 c
            graphdriver load -qi {path} > /dev/null; stat -c %a {path} {path}.2; ls -A | grep ^.graphdriver || true"
        ))
    };
    assert_eq!(made("umask 027", "masked"), "640\n640\n", "the umask counts");
    assert_eq!(made("umask 022; touch kept; chmod 600 kept", "kept"), "600\n644\n", "and what the file kept to itself");
    let through = "mkdir d; ln -s d/x.tar link; ln -s ../link d/again; graphdriver save -o d/again demo
        readlink link d/again; test -f d/x.tar; : > d/x.tar; graphdriver save -o link demo; test -s d/x.tar; test -L link";
    assert_eq!(home.ok(through), "d/x.tar\n../link\n", "symlinks stay, whether they lead to a file or not yet");
    home.fails(2, "ln -s loop loop; graphdriver save -o loop demo", &["writing loop", "symbolic links"]);
    let synced = "strace -f -e trace=fsync,fdatasync,rename,renameat,renameat2 -o calls graphdriver save -o s.tar demo
        grep -B1 -E 'rename.*s.tar' calls | head -1 | grep -c fsync";
    if !skipped("the fsync of an output file", common::no_program(&["strace"])) {
        assert_eq!(home.ok(synced), "1\n", "content before name");
    }
}
