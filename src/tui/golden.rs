//! Does each screen look as it did when somebody last looked at it? And does none of them break under random input?
//!
//! Golden screens with their styles, at three sizes, in colour, without colour and in ASCII; the time stands still. To
//! accept a change: `INSTA_UPDATE=always cargo test --lib golden`, then read the difference.

use std::sync::Arc;
use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier};

use super::model::{Model, Overlay};
use super::test_lock::{LockNews, OwnLock, Stage};
use super::theme::{Look, Theme};
use super::update::{Effect, Msg, update};
use super::view;
use crate::image::header::{Format, Header};
use crate::linux::descriptors::OpenMode;
use crate::linux::lock_table::parse_line;
use crate::linux::mounts::Reach;
use crate::linux::process::ProcessFacts;
use crate::monitor::examples::{descriptor, holds, image, mount, process, sample};
use crate::monitor::sample::{Answer, Backing, DeletedImage, ImageSample, Sample};
use crate::monitor::sampler::Gap;
use crate::monitor::snapshot::Snapshot;

fn header(format: Format, gib: u64) -> Option<Header> {
    Some(Header {
        format,
        virtual_size: Some(gib << 30),
        backing_file: None,
        backing_format: None,
        data_elsewhere: false,
    })
}

fn libvirt(pid: i32, vm: &str) -> ProcessFacts {
    ProcessFacts {
        user: "libvirt-qemu".to_owned(),
        command_line: format!("/usr/bin/qemu-system-x86_64 -name guest={vm},debug-threads=on -S -machine q35"),
        unit: Some(format!(r"machine-qemu\x2d1\x2d{vm}.scope")),
        ..process(pid, "qemu-system-x86", Some(vm))
    }
}

/// A host with one of everything.
fn host() -> Sample {
    let mut images = Vec::new();
    let mut add = |name: &str, inode: u64, format, gib, locked: &str, descriptors: Vec<_>| {
        let mut one = ImageSample { header: header(format, gib).map(Arc::new), descriptors, ..image(name, locked) };
        one.file.inode = inode;
        images.push(one);
    };
    add("web01.qcow2", 1, Format::Qcow2, 40, "cwr/wr", vec![holds(4242, "cwr/wr")]);
    add("base.qcow2", 2, Format::Qcow2, 2, "c/wr", vec![holds(4242, "c/wr"), holds(4243, "c/wr")]);
    add(
        "db01.raw",
        3,
        Format::Raw,
        100,
        "cw/w",
        vec![holds(4244, "cw/w"), descriptor(9912, 3, OpenMode::Write, vec![])],
    );
    add("shared.qcow2", 4, Format::Qcow2, 10, "cwr/wr", vec![]);
    add("secret.raw", 5, Format::Raw, 1, "-/-", vec![]);
    add("日本語-disk.raw", 6, Format::Raw, 8, "-/-", vec![]);
    add("evil\u{1b}[2J\u{202e}.img", 7, Format::Raw, 1, "-/-", vec![descriptor(77, 5, OpenMode::Read, vec![])]);
    let whole = parse_line("1: OFDLCK ADVISORY WRITE -1 08:01:8 0 EOF").unwrap();
    add("cloud.raw", 8, Format::Raw, 4, "cwurg/cwurg", vec![descriptor(78, 9, OpenMode::Write, vec![whole])]);
    Arc::make_mut(images[0].header.as_mut().unwrap()).backing_file = Some("base.qcow2".to_owned());
    images[0].backing =
        Some(Backing { path: images[1].resolved.to_path_buf(), file: Some(images[1].file), answered: true });
    images[3].mount = Some(mount("nfs4", Reach::Remote));
    images[3].table_rows = Arc::default();
    images[4].answer = Answer::CannotOpen(nix::errno::Errno::EACCES as i32);
    images[4].header = None;
    images.sort_by(|a, b| a.path.cmp(&b.path));
    let people = [
        libvirt(4242, "web01"),
        libvirt(4243, "web02"),
        libvirt(4244, "db01"),
        process(9912, "dd", None),
        process(77, "python3", None),
        process(78, "cloud-hyperviso", None),
    ];
    Sample { hidden_processes: 2, ..sample(images, &people) }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds)
}

/// A screen of the host at 120x40, three days and four hours after its VMs started.
fn screen() -> Model {
    let now = at(3 * 86_400 + 4 * 3_600);
    let mut model = Model::new("/images".to_owned(), Duration::from_secs(1), (120, 40), now, TimeZone::UTC);
    update(&mut model, Msg::Clock { now, looked_at: Some(now) });
    let snapshot = Snapshot { taken_at: now, ..Snapshot::of(&host()) };
    update(&mut model, Msg::Snapshot(Arc::new(snapshot)));
    model
}

fn press(model: &mut Model, keys: &str) -> Vec<Effect> {
    let code = |c| match c {
        '\n' => KeyCode::Enter,
        '\t' => KeyCode::Tab,
        '\u{1b}' => KeyCode::Esc,
        c => KeyCode::Char(c),
    };
    let press = |c| update(model, Msg::Key(KeyEvent::new(code(c), KeyModifiers::NONE)));
    keys.chars().flat_map(press).collect()
}

/// The cursor on the image of that name.
fn on(name: &str) -> Model {
    let mut model = screen();
    for _ in 0..20 {
        if model.selected_image().is_some_and(|i| i.path.ends_with(name)) {
            return model;
        }
        press(&mut model, "j");
    }
    panic!("{name} is not on the screen");
}

fn drawn(model: &Model, look: Look) -> Buffer {
    let mut buffer = Buffer::empty(Rect::new(0, 0, model.size.0, model.size.1));
    view::draw(model, &Theme::new(look), &mut buffer);
    buffer
}

/// The characters, and below them a line for each run of cells that does not look plain.
fn as_text(buffer: &Buffer) -> String {
    let mut text = String::new();
    let mut styles = String::new();
    for y in 0..buffer.area.height {
        let mut line = String::new();
        let mut run: Option<(u16, String)> = None;
        let mut skip = 0;
        for x in 0..=buffer.area.width {
            let style = if x < buffer.area.width { style_name(buffer, x, y) } else { Default::default() };
            if run.as_ref().map_or("", |(_, s)| s.as_str()) != style {
                if let Some((from, name)) = run.take() {
                    styles += &format!("{y}:{from}-{} {name}\n", x - 1);
                }
                run = (!style.is_empty()).then_some((x, style));
            }
            if x < buffer.area.width && skip == 0 {
                line += buffer[(x, y)].symbol();
                skip = crate::text::width(buffer[(x, y)].symbol()).saturating_sub(1);
            } else {
                skip = skip.saturating_sub(1);
            }
        }
        text += &format!("|{line}|\n");
    }
    text + &styles
}

fn style_name(buffer: &Buffer, x: u16, y: u16) -> String {
    let cell = &buffer[(x, y)];
    let mut parts = Vec::new();
    if cell.fg != Color::Reset {
        parts.push(format!("{:?}", cell.fg).to_lowercase());
    }
    if cell.bg != Color::Reset {
        parts.push(format!("on {:?}", cell.bg).to_lowercase());
    }
    for (modifier, name) in [
        (Modifier::BOLD, "bold"),
        (Modifier::DIM, "dim"),
        (Modifier::UNDERLINED, "underlined"),
        (Modifier::REVERSED, "reversed"),
    ] {
        if cell.modifier.contains(modifier) {
            parts.push(name.to_owned());
        }
    }
    parts.join("+")
}

const SIZES: [(u16, u16); 3] = [(120, 40), (80, 24), (40, 12)];

/// Compares a screen in all sizes and looks with what was accepted.
fn golden(name: &str, must_show: &str, mut model: Model) {
    let mut text = String::new();
    for size in SIZES {
        update(&mut model, Msg::Size(size.0, size.1));
        for (what, color, ascii) in [("colour", true, false), ("no colour", false, false), ("ascii", false, true)] {
            let buffer = drawn(&model, Look { color, ascii, mouse: false });
            if ascii {
                assert!(buffer.content.iter().all(|c| c.symbol().is_ascii()), "{name} at {size:?}");
            }
            if !color {
                assert!(
                    buffer.content.iter().all(|c| c.fg == Color::Reset && c.bg == Color::Reset),
                    "{name} at {size:?}"
                );
            }
            text += &format!("{}x{} {what}\n{}\n", size.0, size.1, as_text(&buffer));
        }
    }
    let mut settings = insta::Settings::new();
    settings.set_snapshot_path("../../tests/fixtures/golden");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.set_description(must_show);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn golden_first_look() {
    let model = Model::new("/images".to_owned(), Duration::from_secs(1), (120, 40), at(0), TimeZone::UTC);
    golden(
        "looking",
        "before the first look is done it says that it is looking, and nothing that could be wrong",
        model,
    );
}

#[test]
fn golden_bytes() {
    golden(
        "bytes",
        "the danger on top, problems first in the table, ten bytes with their holders below",
        on("db01.raw"),
    );
    golden("bytes-unknown", "an image that may not be read: every byte a question mark, and why", on("secret.raw"));
    golden("bytes-elsewhere", "held bytes without a name, and on which file server to look", on("shared.qcow2"));
}

#[test]
fn golden_holders() {
    let mut model = on("base.qcow2");
    press(&mut model, "2");
    golden("holders", "each process: role, what it uses and denies, user, age, unit, command line", model);
}

#[test]
fn golden_what_if() {
    let mut model = on("web01.qcow2");
    press(&mut model, "3");
    golden("what-if", "each program: refused with QEMU's sentence, the byte and by whom, or granted", model);
    let mut model = on("evil\u{1b}[2J\u{202e}.img");
    press(&mut model, "3\n");
    golden(
        "what-if-overwrites",
        "create would be granted and overwrite an image that is in use: said first; zoomed",
        model,
    );
}

#[test]
fn golden_chain() {
    let mut model = on("base.qcow2");
    press(&mut model, "4");
    golden("chain", "the overlays that stand on the image, itself, and what is below", model);
}

#[test]
fn golden_events() {
    let mut model = on("web01.qcow2");
    let mut later = host();
    later.taken_at = at(3 * 86_400 + 4 * 3_600 + 5);
    let web = later.images.iter_mut().find(|i| i.path.ends_with("web01.qcow2")).unwrap();
    let web = Arc::make_mut(web);
    (web.descriptors, web.answer) = (vec![], image("a", "-/-").answer);
    later.deleted.push(DeletedImage { path: "/images/old.raw".into(), descriptor: holds(4242, "cw/w") });
    update(&mut model, Msg::Snapshot(Arc::new(Snapshot::of(&later))));
    update(&mut model, Msg::Gap(Gap::anywhere("the kernel's queue of file events overflowed")));
    press(&mut model, "5");
    golden("events", "newest first: what was let go and by whom, and that something may have been missed", model);
}

#[test]
fn golden_processes() {
    let mut model = screen();
    press(&mut model, "pj");
    golden("processes", "a process a row with each image it uses and how, the selected one in full below", model);
}

#[test]
fn golden_lists() {
    let mut model = screen();
    press(&mut model, "?");
    golden("help", "every key and mark; on a small screen as many as fit", model);
    let mut model = screen();
    press(&mut model, "fj");
    golden("findings", "every finding, worst first, with its image", model);
    let mut model = on("web01.qcow2");
    press(&mut model, "c");
    golden("copy", "path, pid, commands and JSON of the row, to be copied and not run", model);
}

#[test]
fn golden_filter() {
    let mut model = screen();
    press(&mut model, "/vm:web");
    golden("filter", "the filter being typed, how many images fit, and only those in the table", model);
    let mut model = screen();
    press(&mut model, "/state:fre\n");
    golden("filter-wrong", "what is not understood is explained in place and hides nothing", model);
}

#[test]
fn golden_frozen() {
    let mut model = screen();
    press(&mut model, " ");
    update(&mut model, Msg::Snapshot(Arc::new(Snapshot::of(&Sample { images: Vec::new(), ..host() }))));
    let now = model.now + SignedDuration::from_secs(12);
    update(&mut model, Msg::Clock { now, looked_at: Some(now) });
    golden("frozen", "a banner with age and number of changes; the table as it was", model);
}

#[test]
fn golden_stale_and_empty() {
    let mut model = screen();
    let now = model.now + SignedDuration::from_secs(90);
    let looked_at = model.looked_at;
    update(&mut model, Msg::Clock { now, looked_at });
    golden("stale", "the title says how long ago it was last looked", model);
    let mut model = screen();
    update(&mut model, Msg::Snapshot(Arc::new(Snapshot::of(&sample(Vec::new(), &[])))));
    golden("empty", "no images yet, and that this may change", model);
}

/// A test lock of our own on the free image.
fn with_own_lock() -> Model {
    let mut model = on("日本語-disk.raw");
    let mut later = host();
    let image = later.images.iter_mut().find(|i| i.path.ends_with("日本語-disk.raw")).unwrap();
    let sampled = crate::monitor::examples::image("x", "cw/w");
    let image = Arc::make_mut(image);
    (image.answer, image.table_rows) = (sampled.answer, sampled.table_rows);
    image.descriptors = vec![holds(500, "cw/w")];
    later.processes.insert(500, Arc::new(process(500, "qlock-top", None)));
    later.taken_by = 500;
    let key = model.selected.clone().unwrap();
    update(&mut model, Msg::Snapshot(Arc::new(Snapshot::of(&later))));
    let lock =
        OwnLock { id: 1, key, access: "cw/w".parse().unwrap(), until: model.now + SignedDuration::from_secs(27) };
    update(&mut model, Msg::Lock(LockNews::Taken(lock)));
    press(&mut model, "1");
    model
}

#[test]
fn golden_test_lock() {
    let mut model = on("db01.raw");
    press(&mut model, "t");
    golden(
        "test-lock",
        "the programs, and for the chosen one whom it would hit and what it would refuse",
        model.clone(),
    );
    press(&mut model, "\n");
    let key = model.selected.clone().unwrap();
    update(
        &mut model,
        Msg::Lock(LockNews::Checked { key, result: Err("/images/db01.raw: Failed to get \"write\" lock".to_owned()) }),
    );
    golden("test-lock-checked", "check only comes first; its answer stands below", model.clone());
    press(&mut model, "j\n");
    golden("test-lock-confirm", "the image is in use: No comes first", model);
    let mut model = on("日本語-disk.raw");
    press(&mut model, "t\tj ");
    golden("test-lock-bytes", "the ten bytes with those that are chosen", model);
    golden(
        "test-lock-held",
        "a banner with the countdown; our own lock is told apart in table and panel",
        with_own_lock(),
    );
}

#[test]
fn a_test_lock_is_checked_first_and_confirmed_where_somebody_is_in_the_way() {
    let mut model = on("db01.raw");
    let effects = press(&mut model, "t\n\n");
    assert!(matches!(effects.as_slice(), [Effect::CheckLock { .. }]), "{effects:?}");
    // Take, and Enter again: that answers No.
    assert_eq!(press(&mut model, "j\n\n"), []);
    let effects = press(&mut model, "j++\nj\n");
    let [Effect::TakeLock { accesses, limit, .. }] = effects.as_slice() else { panic!("{effects:?}") };
    assert_eq!((accesses.last().unwrap().to_string().as_str(), *limit), ("cw/w", Duration::from_secs(120)));
    // Nobody uses this one: no question is asked.
    let effects = press(&mut on("日本語-disk.raw"), "t\nj\n");
    assert!(matches!(effects.as_slice(), [Effect::TakeLock { limit, .. }] if *limit == Duration::from_secs(30)));
}

#[test]
fn the_longest_test_lock_is_an_hour_and_graph_mod_is_never_taken() {
    let mut model = on("日本語-disk.raw");
    let effects = press(&mut model, "t\t++++++++++++jjjj jjjjj \n");
    assert_eq!(effects, [], "nothing is chosen yet");
    let effects = press(&mut model, "k \nj\n");
    let [Effect::TakeLock { accesses, limit, .. }] = effects.as_slice() else { panic!("{effects:?}") };
    assert_eq!((accesses[0].to_string().as_str(), limit.as_secs()), ("-/r", 3600));
}

#[test]
fn u_lets_go_of_the_lock_on_the_image_and_a_large_u_of_all() {
    let mut model = with_own_lock();
    assert_eq!(press(&mut model, "u"), [Effect::ReleaseLock(1)]);
    assert_eq!(press(&mut model, "U"), [Effect::ReleaseLock(1)]);
    update(&mut model, Msg::Lock(LockNews::Ended { id: 1, by_deadline: true }));
    assert!(model.own_locks.is_empty() && model.note.as_ref().unwrap().contains("its time is up"));
    assert_eq!(press(&mut model, "uU"), []);
}

#[test]
fn read_only_says_so_and_opens_no_dialog() {
    let mut model = on("日本語-disk.raw");
    model.read_only = true;
    assert_eq!(press(&mut model, "t\n\n"), []);
    assert_eq!(model.overlay, None);
    press(&mut model, "t");
    assert!(model.note.as_ref().unwrap().starts_with("read-only: no test locks"));
}

#[test]
fn a_terminal_that_is_too_small_gets_one_sentence() {
    let mut model = screen();
    update(&mut model, Msg::Size(30, 9));
    let text = as_text(&drawn(&model, Look { color: true, ascii: false, mouse: false }));
    assert!(text.starts_with("|30x9 is too small: qlock-top  |\n|needs 40x10"), "{text}");
}

#[test]
fn a_click_selects_a_row_or_a_panel() {
    use crossterm::event::{MouseButton, MouseEvent, MouseEventKind};
    let mut model = screen();
    let click = |model: &mut Model, column, row| {
        let kind = MouseEventKind::Down(MouseButton::Left);
        update(model, Msg::Mouse(MouseEvent { kind, column, row, modifiers: KeyModifiers::NONE }));
    };
    click(&mut model, 5, 6);
    assert_eq!(model.cursor(), Some(2));
    let rule = (0..40).find(|y| matches!(view::target(&model, 30, *y), Some(view::Target::Panel(_)))).unwrap();
    click(&mut model, 30, rule);
    assert_eq!(model.panel, super::model::Panel::WhatIf);
    click(&mut model, 5, 39);
    assert_eq!(model.cursor(), Some(2));
}

#[test]
fn a_finding_leads_to_its_image_through_any_filter() {
    let mut model = screen();
    press(&mut model, "/vm:web01\nf\n");
    let image = model.selected_image().unwrap();
    assert!(image.path.ends_with("db01.raw"), "the worst finding");
    assert_eq!(model.overlay, None);
}

#[test]
fn copying_gives_text_that_acts_on_no_terminal() {
    let mut model = on("evil\u{1b}[2J\u{202e}.img");
    for number in ["1", "2", "3", "4", "5"] {
        let effects = press(&mut model, &format!("c{number}"));
        let [Effect::Copy(text)] = effects.as_slice() else { panic!("{effects:?}") };
        assert!(!text.chars().any(crate::text::is_treacherous), "{text:?}");
    }
    let effects = press(&mut on("web01.qcow2"), "cjjj\n");
    assert_eq!(effects, [Effect::Copy("virsh shutdown web01".to_owned())]);
}

#[test]
fn a_paste_is_text_or_nothing() {
    let mut model = screen();
    assert_eq!(update(&mut model, Msg::Paste("q\nq".to_owned())), []);
    press(&mut model, "/");
    assert_eq!(update(&mut model, Msg::Paste("vm:web\n01".to_owned())), []);
    assert_eq!(model.filter.text(), "vm:web 01");
}

fn message() -> impl Strategy<Value = Msg> {
    let keys = prop_oneof![
        4 => prop::sample::select("jkgG?/sS pfctuU+-rm12345[]q\u{1b}\n\tvm:web!xe".chars().collect::<Vec<_>>()).prop_map(|c| match c {
            '\n' => KeyCode::Enter,
            '\t' => KeyCode::Tab,
            '\u{1b}' => KeyCode::Esc,
            c => KeyCode::Char(c),
        }),
        1 => prop::sample::select(vec![KeyCode::Up, KeyCode::Down, KeyCode::PageUp, KeyCode::PageDown, KeyCode::Home,
            KeyCode::End, KeyCode::BackTab, KeyCode::Backspace, KeyCode::F(1), KeyCode::Delete]),
    ];
    let modifiers = prop_oneof![9 => Just(KeyModifiers::NONE), 1 => Just(KeyModifiers::CONTROL)];
    prop_oneof![
        10 => (keys, modifiers).prop_map(|(code, modifiers)| Msg::Key(KeyEvent::new(code, modifiers))),
        2 => (1u16..300, 1u16..100).prop_map(|(c, r)| Msg::Size(c, r)),
        3 => (any::<u16>(), 0i64..10_000).prop_map(|(kept, time)| {
            let mut sample = host();
            let mut bit = 0;
            sample.images.retain(|_| { bit += 1; kept & (1 << bit) != 0 });
            sample.taken_at = at(time);
            Msg::Snapshot(Arc::new(Snapshot::of(&sample)))
        }),
        1 => "\\PC{0,20}".prop_map(Msg::Paste),
        1 => "\\PC{0,20}".prop_map(|text| Msg::Gap(Gap::anywhere(text))),
        2 => (0u64..4, 0u8..4).prop_map(|(id, kind)| {
            let first = &host().images[0];
            let key = (first.path.clone(), first.file);
            Msg::Lock(match kind {
                0 => LockNews::Taken(OwnLock { id, key, access: "cw/w".parse().unwrap(), until: at(300_000) }),
                1 => LockNews::Ended { id, by_deadline: true },
                2 => LockNews::Checked { key, result: Err("because".to_owned()) },
                _ => LockNews::Refused { key, why: "because".to_owned() },
            })
        }),
        1 => (0i64..1_000_000).prop_map(|s| Msg::Clock { now: at(s), looked_at: Some(at(s / 2)) }),
        1 => (0u16..300, 0u16..100, 0u8..3).prop_map(|(column, row, kind)| {
            use crossterm::event::{MouseButton, MouseEvent, MouseEventKind};
            let kind = [MouseEventKind::Down(MouseButton::Left), MouseEventKind::ScrollDown, MouseEventKind::ScrollUp][usize::from(kind)];
            Msg::Mouse(MouseEvent { kind, column, row, modifiers: KeyModifiers::NONE })
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn no_sequence_of_messages_breaks_the_screen(
        messages in proptest::collection::vec(message(), 1..60),
        read_only in any::<bool>(),
    ) {
        let mut model = screen();
        model.read_only = read_only;
        for message in messages {
            let confirmed = matches!(
                &model.overlay,
                Some(Overlay::TestLock(d)) if matches!(d.stage, Stage::Decide { take: true } | Stage::Confirm { yes: true })
            );
            for effect in update(&mut model, message) {
                let asks = matches!(effect, Effect::TakeLock { .. } | Effect::CheckLock { .. });
                prop_assert!(!(asks && read_only), "read-only never asks for a lock");
                if let Effect::TakeLock { limit, .. } = effect {
                    prop_assert!(confirmed, "only the second choice takes");
                    prop_assert!(limit <= Duration::from_secs(3600));
                }
            }
            // The selection is valid, or there is nothing to select.
            prop_assert_eq!(model.selected_row().is_some(), !model.rows.is_empty());
            prop_assert!(model.cursor().is_some() || model.row_count() == 0);
            // The rows are exactly the images that fit the filter, each once.
            let mut rows = model.rows.clone();
            rows.sort_unstable();
            let fitting: Vec<usize> =
                (0..model.images().len()).filter(|i| model.filter.matches(&model.images()[*i])).collect();
            prop_assert_eq!(rows, fitting);
            if let Some(Overlay::Findings(row)) = model.overlay {
                prop_assert!(row == 0 || row < model.findings().len());
            }
            let buffer = drawn(&model, Look { color: true, ascii: false, mouse: false });
            let text = as_text(&buffer);
            prop_assert!(!text.chars().any(|c| c != '\n' && crate::text::is_treacherous(c)));
            let (columns, rows) = model.size;
            if (model.typing || model.filter.is_active()) && columns >= 40 && rows >= 10 {
                prop_assert!(text.contains("| filter /"), "the filter line is always there");
            }
        }
    }
}
