//! What does the host's administrator want of every start?
//!
//! `/etc/qlock-top.toml`, and after it the file that `--config` names. A setting that forbids, `read-only`, cannot be taken
//! back by the second. `assets/qlock-top.toml` is a sample with every setting.

use std::io;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;

use crate::text::{escape, escape_path};

/// Read at every start, if it is there.
pub const SYSTEM: &str = "/etc/qlock-top.toml";

/// When to use colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Color {
    /// Unless `NO_COLOR` is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// No lock is ever taken: no test locks, no `hold`.
    pub read_only: bool,
    /// What is looked at where no PATH is given.
    pub paths: Vec<PathBuf>,
    /// Directories with all below them.
    pub recursive: bool,
    /// Time between two looks, as `--interval` takes it.
    pub interval: Option<String>,
    /// When to use colour.
    pub color: Option<Color>,
    /// Nothing but ASCII.
    pub ascii: bool,
    /// Listen to the mouse from the start.
    pub mouse: bool,
}

/// Why the settings cannot be used. Nothing starts then: a `read-only` that was not understood must not be passed over.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", escape_path(.path))]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not understood.
    #[error("{}: {text}; assets/qlock-top.toml has every setting", escape_path(.path))]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and in which line; escaped.
        text: String,
    },
}

impl Config {
    /// Reads the host's settings, and those of `extra` on top of them.
    ///
    /// # Errors
    /// [`ConfigError`]. A missing `/etc/qlock-top.toml` is none.
    pub fn read(extra: Option<&Path>) -> Result<Self, ConfigError> {
        let system = match Self::from_file(Path::new(SYSTEM)) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Self::default(),
            other => other?,
        };
        match extra {
            Some(path) => Ok(system.and(Self::from_file(path)?)),
            None => Ok(system),
        }
    }

    fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|e| {
            let line = e
                .span()
                .map(|s| text.as_bytes()[..s.start.min(text.len())].iter().filter(|b| **b == b'\n').count() + 1);
            let at = line.map(|l| format!("line {l}: ")).unwrap_or_default();
            ConfigError::Syntax { path: path.to_owned(), text: format!("{at}{}", escape(e.message())) }
        })
    }

    fn and(self, later: Self) -> Self {
        Self {
            read_only: self.read_only || later.read_only,
            paths: if later.paths.is_empty() { self.paths } else { later.paths },
            recursive: self.recursive || later.recursive,
            interval: later.interval.or(self.interval),
            color: later.color.or(self.color),
            ascii: self.ascii || later.ascii,
            mouse: self.mouse || later.mouse,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> Result<Config, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::from_file(file.path()).map_err(|e| e.to_string())
    }

    #[test]
    fn the_sample_is_understood_and_names_every_setting() {
        let sample = include_str!("../assets/qlock-top.toml");
        let all: String = sample
            .lines()
            .map(|l| l.strip_prefix("# ").filter(|l| l.contains(" = ")).unwrap_or(l))
            .map(|l| format!("{l}\n"))
            .collect();
        let config = written(&all).unwrap();
        assert_eq!(
            config,
            Config {
                read_only: true,
                paths: vec!["/var/lib/libvirt/images".into(), "/srv/images".into()],
                recursive: true,
                interval: Some("2s".to_owned()),
                color: Some(Color::Never),
                ascii: true,
                mouse: true,
            }
        );
        assert_eq!(written(sample).unwrap(), Config::default(), "as it is installed it changes nothing");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, expected) in [
            ("\nread-onyl = true\n", "line 2: unknown field `read-onyl`"),
            ("read-only = \"yes\"", "line 1: invalid type"),
            ("color = \"pink\"", "unknown variant `pink`"),
            ("= \u{1b}", "line 1"),
        ] {
            let error = written(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains('\u{1b}'), "{error}");
        }
        let missing = Config::read(Some(Path::new("/nowhere.toml"))).unwrap_err().to_string();
        assert!(missing.starts_with("/nowhere.toml: "), "{missing}");
    }

    #[test]
    fn what_the_host_forbids_stays_forbidden() {
        let host = Config { read_only: true, interval: Some("5s".to_owned()), ..Config::default() };
        let both = host.and(Config { interval: Some("1s".to_owned()), ..Config::default() });
        assert_eq!((both.read_only, both.interval.as_deref()), (true, Some("1s")));
    }
}
