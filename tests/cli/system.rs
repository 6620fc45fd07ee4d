//! df and events.

use crate::common::Home;
use serde_json::Value;
use std::{
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    process::Stdio,
    time::{Duration, Instant},
};

#[test]
fn the_sums_of_df_add_up() {
    needs_root!("the_sums_of_df_add_up");
    let home = Home::with_container();
    home.ok("graphdriver load -qi both.tar; graphdriver cp both.tar c:/; graphdriver create --name d other:1");
    let (totals, all) = (home.json("df"), home.json("df -v"));
    let sum =
        |list: &str, key: &str| all[list].as_array().unwrap().iter().map(|i| i[key].as_u64().unwrap()).sum::<u64>();
    for image in all["Images"].as_array().unwrap() {
        let number = |key: &str| image[key].as_u64().unwrap();
        assert_eq!(number("Size"), number("Shared") + number("Unique"));
    }
    // Both images share just their base, so it is in each one's shared size and once in the total.
    let shared = all["Images"][0]["Shared"].as_u64().unwrap();
    assert!(shared > 0);
    assert_eq!(totals[0]["Size"], sum("Images", "Unique") + shared);
    assert_eq!(totals[1]["Size"], sum("Containers", "Size"));
    assert!(sum("Containers", "Size") > std::fs::metadata(home.path().join("both.tar")).unwrap().len());
    assert_eq!((&totals[0]["Reclaimable"], &totals[1]["Reclaimable"]), (&0.into(), &totals[1]["Size"]));
    home.ok("graphdriver rm d");
    let unique = home.json("df -v")["Images"].as_array().unwrap().iter().find(|i| i["Names"][0] == "other:1").unwrap()
        ["Unique"]
        .clone();
    assert_eq!(home.json("df")[0]["Reclaimable"], unique, "what nothing but an unused image needs");
    let before = home.json("df")[0]["Size"].as_u64().unwrap();
    home.ok("graphdriver image prune -a");
    assert_eq!(before - home.json("df")[0]["Size"].as_u64().unwrap(), unique.as_u64().unwrap());
    let table = home.ok("graphdriver df; graphdriver df -v");
    for word in ["RECLAIMABLE", "SHARED SIZE", "UNIQUE SIZE", "Images", "Containers", "demo:1, demo:latest"] {
        assert!(table.contains(word), "{word}: {table}");
    }
}

#[test]
fn events_are_remembered_and_filtered() {
    needs_root!("events_are_remembered_and_filtered");
    let home = Home::with_container();
    home.ok("mkdir m; graphdriver mount c m; graphdriver umount m; graphdriver rename c d; graphdriver commit d new
        graphdriver rm d; graphdriver rmi new");
    let actions = |arguments: &str| {
        let text = home.ok(&format!("graphdriver --format json events {arguments}"));
        let event = |line: &str| serde_json::from_str::<Value>(line).unwrap()["Action"].as_str().unwrap().to_owned();
        text.lines().map(event).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(actions(""), "load tag tag create mount unmount rename commit tag destroy untag delete");
    assert_eq!(actions("--filter type=container"), "create mount unmount rename destroy");
    assert_eq!(actions("--filter type=image --filter event=tag --filter event=load"), "load tag tag tag");
    assert_eq!(actions("--filter image=new"), "commit tag untag");
    assert_eq!(actions("--until 2001-01-01T00:00:00Z"), "");
    assert_eq!(actions("--since 1h --filter container=d"), "rename destroy");
    let lines = home.ok("graphdriver events --since 1h");
    assert!(
        lines.lines().all(|l| l.split(' ').next().unwrap().len() == "2026-01-31T12:00:00.000000000Z".len()),
        "{lines}"
    );
    home.fails(2, "graphdriver events --filter colour=red", &["colour", "type="]);
    home.fails(2, "graphdriver events --since yesterday", &["yesterday", "10m"]);
    home.fails(2, "graphdriver events --since 1m --until 1h", &["later"]);
}

#[test]
fn events_follow_sees_another_process_within_a_second() {
    needs_root!("events_follow_sees_another_process_within_a_second");
    let home = Home::new();
    home.ok("graphdriver load -qi demo.tar");
    let mut follower = home.shell("exec graphdriver events --follow --filter event=tag --filter image=demo:2");
    let mut follower = follower.stdout(Stdio::piped()).process_group(0).spawn().unwrap();
    let lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(tell.send((Instant::now(), line)))));
    // It may not follow yet, and a busy machine may be late with anything.
    let in_time = (0..30).any(|_| {
        let begun = Instant::now();
        home.ok("graphdriver tag demo demo:2");
        let tagged = Instant::now();
        let seen = told.recv_timeout(Duration::from_secs(2));
        home.ok("graphdriver rmi demo:2 > /dev/null");
        seen.is_ok_and(|(at, line)| {
            assert!(line.contains("image tag"), "{line}");
            at >= begun && at.saturating_duration_since(tagged) < Duration::from_secs(1)
        })
    });
    let pid = rustix::process::Pid::from_child(&follower);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(follower.wait().unwrap().success(), "an interrupt is how following ends");
    assert!(in_time, "never within a second");
}
