"use strict";
// Every text of the page in both languages, and how numbers are written.
const WORDS = {
  en: {
    runs: "Runs", smoothing: "Smoothing", differences: "What differs in the configs", samples: "Samples over time",
    iter: "iterations", tokens: "tokens", hours: "hours", iteration: "iteration", other: "中文", light: "Light", dark: "Dark",
    live: "following", lost: "the server does not answer", file: "report", reset: "Reset zoom", none: "none", recorded: "as logged",
    running: "running", finished: "finished", stopped: "stopped", failed: "failed", ended: "ended without a reason",
    replaced: "earlier run", loss: "Loss", val_loss: "validation", lr: "Learning rate", grad_norm: "Gradient norm",
    tokens_per_s: "Tokens per second", tokens_per_s_a_rank: "Tokens per second and rank", mfu: "MFU", memory: "Peak memory",
    time: "Time of an iteration", data_time: "Waiting for data", raw: "raw", smoothed: "smoothed", save: "saved",
    stop: "stopped", resume: "resumed", skipped: "step not applied", spike: "loss spike", plateau: "plateau",
    "slow rank": "slow rank", rank_slowest: "slowest", rank_median: "median", rank_times: "Work of ranks between two messages", rank_product: "Fixed product, slowest GPU ÷ median",
    "epoch/…": "Epochs of each source", "targets/…": "Targets of each source",
    failure: "failed", setting: "setting", eta: time => `${time} left`, sources: "Loss by source", nats: "nats per token", seconds: "s",
    damaged: n => `${n} damaged lines were skipped`, starts: n => `${n} starts`, warned: "Last warning: ",
    nothing: "No run has written metrics here yet. This page follows the folder: runs appear with their first log line.",
    unselected: "Select a run.",
    keys: "Drag over a chart to zoom, double-click to zoom out. Keys in a chart: ← → move, + − zoom, 0 zooms out. " +
      "On a phone: slide to read values, pinch to zoom.",
  },
  zh: {
    runs: "训练", smoothing: "平滑", differences: "配置中的差异", samples: "各时刻的采样",
    iter: "迭代", tokens: "token", hours: "小时", iteration: "迭代", other: "English", light: "浅色", dark: "深色",
    live: "实时更新", lost: "服务没有响应", file: "报告", reset: "恢复缩放", none: "不平滑", recorded: "同日志",
    running: "运行中", finished: "已完成", stopped: "已停止", failed: "失败", ended: "异常中断",
    replaced: "较早的训练", loss: "损失", val_loss: "验证", lr: "学习率", grad_norm: "梯度范数",
    tokens_per_s: "每秒 token 数", tokens_per_s_a_rank: "每个 rank 每秒 token 数", mfu: "MFU", memory: "峰值内存",
    time: "每次迭代用时", data_time: "等待数据", raw: "原始", smoothed: "平滑", save: "已保存",
    stop: "停止", resume: "续训", skipped: "未更新", spike: "损失突增", plateau: "损失停滞",
    "slow rank": "慢 rank", rank_slowest: "最慢", rank_median: "中位", rank_times: "两次消息之间 rank 的工作时间", rank_product: "固定矩阵乘法，最慢 GPU ÷ 中位",
    "epoch/…": "各来源的轮数", "targets/…": "各来源的目标数",
    failure: "失败", setting: "设置", eta: time => `剩余 ${time}`, sources: "各来源的损失", nats: "nats / token", seconds: "秒",
    damaged: n => `跳过了 ${n} 行损坏的记录`, starts: n => `启动 ${n} 次`, warned: "最近的警告（日志原文）：",
    nothing: "这里还没有训练写出指标。本页持续关注该目录：训练写出第一行日志后就会出现。",
    unselected: "请选择一个训练。",
    keys: "在图上拖动以放大，双击还原。图内按键：← → 移动，+ − 缩放，0 还原。手机上：滑动读数，双指缩放。",
  },
};
const stored = (key, otherwise) => { try { return localStorage.getItem("xtuner-" + key) || otherwise; } catch { return otherwise; } };
const store = (key, value) => { try { localStorage.setItem("xtuner-" + key, value); } catch { /* a file, or private mode */ } };
let language = stored("language", navigator.language.startsWith("zh") ? "zh" : "en");
const word = key => WORDS[language][key] ?? key;

function count(value) {
  const size = Math.abs(value);
  for (const [least, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]])
    if (size >= least) return +(value / (letter === "k" ? 1e3 : least)).toPrecision(4) + letter;
  return String(+value.toPrecision(6));
}
function bytes(value) {
  for (const [size, letter] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (Math.abs(value) >= size) return +(value / size).toPrecision(4) + " " + letter;
  return value + " B";
}
function small(value) {
  if (Math.abs(value) >= 1e4) return count(value);
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(4));
}
function duration(seconds) {
  const h = Math.floor(seconds / 3600), m = Math.floor(seconds / 60) % 60;
  return h ? `${h}h ${String(m).padStart(2, "0")}m` : m ? `${m}m ${Math.floor(seconds % 60)}s` : `${Math.floor(seconds)}s`;
}
