package main

import (
	"fmt"
	"image/color"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"tercet.dev/tercet/bench"
)

// The look of a contender is the same in every picture. The colours are told apart by people who see red and green
// alike (Okabe and Ito); Tercet's own are blue and solid.
var looks = map[string]struct {
	c     color.RGBA
	dash  []vg.Length
	glyph draw.GlyphDrawer
}{
	"tercet/leader":     {color.RGBA{0, 60, 130, 255}, nil, draw.CircleGlyph{}},
	"tercet/resp":       {color.RGBA{0, 114, 178, 255}, nil, draw.SquareGlyph{}},
	"tercet/http":       {color.RGBA{86, 180, 233, 255}, nil, draw.TriangleGlyph{}},
	"raft-wal/leader":   {color.RGBA{120, 120, 120, 255}, dashed, draw.CrossGlyph{}},
	"jetstream-always":  {color.RGBA{0, 158, 115, 255}, dashed, draw.CircleGlyph{}},
	"jetstream-default": {color.RGBA{0, 158, 115, 255}, dotted, draw.RingGlyph{}},
	"redis":             {color.RGBA{213, 94, 0, 255}, dashed, draw.SquareGlyph{}},
	"rabbitmq":          {color.RGBA{230, 159, 0, 255}, dashed, draw.PyramidGlyph{}},
}

var (
	dashed = []vg.Length{vg.Points(5), vg.Points(3)}
	dotted = []vg.Length{vg.Points(1.5), vg.Points(2.5)}
	grey   = color.RGBA{90, 90, 90, 255}
)

const (
	pictureWidth  = 17 * vg.Centimeter
	pictureHeight = 10 * vg.Centimeter
)

// series are the points of one contender.
type series struct {
	name   string
	points plotter.XYs
}

// canvas is a picture being drawn.
type canvas struct {
	*plot.Plot
	title string
}

func newCanvas(title, x, y string) *canvas {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.Padding = vg.Points(8)
	p.Legend.Top, p.Legend.Left, p.Legend.XOffs = true, false, vg.Points(-4)
	p.Legend.TextStyle.Font.Size = vg.Points(8)
	p.BackgroundColor = color.White
	grid := plotter.NewGrid()
	grid.Horizontal.Color, grid.Vertical.Color = color.RGBA{225, 225, 225, 255}, color.RGBA{235, 235, 235, 255}
	p.Add(grid)
	return &canvas{p, title}
}

// add draws one contender.
func (c *canvas) add(s series) error {
	line, points, err := plotter.NewLinePoints(s.points)
	if err != nil {
		return err
	}
	look, ok := looks[s.name]
	if !ok {
		look.c, look.glyph = grey, draw.CircleGlyph{}
	}
	line.Color, line.Dashes, line.Width = look.c, look.dash, vg.Points(1.6)
	points.Color, points.Shape, points.Radius = look.c, look.glyph, vg.Points(2.6)
	c.Add(line, points)
	c.Legend.Add(s.name, line, points)
	return nil
}

// limit draws a horizontal line across.
func (c *canvas) limit(y, from, to float64, name string) error {
	line, err := plotter.NewLine(plotter.XYs{{X: from, Y: y}, {X: to, Y: y}})
	if err != nil {
		return err
	}
	line.Color, line.Width, line.Dashes = grey, vg.Points(1), []vg.Length{vg.Points(8), vg.Points(4)}
	c.Add(line)
	c.Legend.Add(name, line)
	return nil
}

// save writes the picture.
func (c *canvas) save(dir, name string, png bool) (picture, error) {
	file := name + ".svg"
	if err := c.Save(pictureWidth, pictureHeight, filepath.Join(dir, file)); err != nil {
		return picture{}, err
	}
	if png {
		if err := c.Save(pictureWidth, pictureHeight, filepath.Join(dir, name+".png")); err != nil {
			return picture{}, err
		}
	}
	return picture{file, c.title}, nil
}

// logarithmic makes an axis logarithmic with room at both ends.
func logarithmic(a *plot.Axis, ticks plot.Ticker) {
	a.Scale, a.Tick.Marker = plot.LogScale{}, ticks
}

// countTicks are the powers of ten and, in between, 2 and 5, written short.
type countTicks struct{ unit func(float64) string }

// Ticks implements plot.Ticker.
func (t countTicks) Ticks(least, most float64) []plot.Tick {
	var all []plot.Tick
	decades := math.Log10(most / least)
	for e := math.Floor(math.Log10(least)); e <= math.Ceil(math.Log10(most)); e++ {
		for _, f := range []float64{1, 2, 5} {
			v := f * math.Pow(10, e)
			if v < least*0.999 || v > most*1.001 {
				continue
			}
			label := t.unit(v)
			if f != 1 && decades > 3 {
				label = ""
			}
			all = append(all, plot.Tick{Value: v, Label: label})
		}
	}
	return all
}

// short writes 12 000 as 12k.
func short(v float64) string {
	switch {
	case v >= 1e6:
		return strconv.FormatFloat(v/1e6, 'g', 4, 64) + "M"
	case v >= 1e3:
		return strconv.FormatFloat(v/1e3, 'g', 4, 64) + "k"
	}
	return strconv.FormatFloat(v, 'g', 4, 64)
}

func shortBytes(v float64) string { return short(v) + "B/s" }

// named ticks stand at given places.
func named(places map[float64]string) plot.ConstantTicks {
	var all plot.ConstantTicks
	for v, label := range places {
		all = append(all, plot.Tick{Value: v, Label: label})
	}
	return all
}

// fit sets the range of a logarithmic axis to whole steps around values.
func fit(a *plot.Axis, values []float64) {
	least, most := slices.Min(values), slices.Max(values)
	a.Min, a.Max = least/1.5, most*1.5
}

// drawAll makes all pictures for which there are measurements.
func drawAll(r *results, dir string, png bool) ([]picture, error) {
	var all []picture
	for _, make := range []func() (*canvas, string, error){
		r.byConcurrency, r.byPayload,
		func() (*canvas, string, error) { return r.percentiles("clients-16", false) },
		func() (*canvas, string, error) { return r.percentiles("clients-256", false) },
		func() (*canvas, string, error) { return r.percentiles("rate-500", true) },
		func() (*canvas, string, error) { return r.percentiles("roundtrip", true) },
		r.bars, r.timeline,
	} {
		c, name, err := make()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if c == nil {
			continue
		}
		p, err := c.save(dir, name, png)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, p)
	}
	return all, nil
}

// contendersOf lists those that have results in a line.
func (l *lineResult) contendersOf() []contender {
	var all []contender
	for _, c := range l.Contenders {
		if len(l.values(c, "", rateOf)) > 0 && !slices.Contains(all, c) {
			all = append(all, c)
		}
	}
	return all
}

// collect makes a series per contender out of lines, each of which stands at a place on the x axis.
func (r *results) collect(places map[string]float64, y func(l *lineResult, c contender) float64) (all []series, values []float64) {
	points := map[contender]plotter.XYs{}
	var order []contender
	for i := range r.Lines {
		l := &r.Lines[i]
		x, ok := places[l.Name]
		if !ok {
			continue
		}
		for _, c := range l.contendersOf() {
			if v := y(l, c); v > 0 {
				if points[c] == nil {
					order = append(order, c)
				}
				points[c] = append(points[c], plotter.XY{X: x, Y: v})
				values = append(values, v)
			}
		}
	}
	for _, c := range order {
		slices.SortFunc(points[c], func(a, b plotter.XY) int { return int(math.Copysign(1, a.X-b.X)) })
		all = append(all, series{c.String(), points[c]})
	}
	return all, values
}

// byConcurrency is throughput over the number of clients.
func (r *results) byConcurrency() (*canvas, string, error) {
	places, ticks := map[string]float64{}, map[float64]string{}
	for _, l := range r.Lines {
		if strings.HasPrefix(l.Name, "clients-") {
			n := float64(l.W.Publishers)
			places[l.Name], ticks[n] = n, strconv.Itoa(l.W.Publishers)
		}
	}
	all, values := r.collect(places, func(l *lineResult, c contender) float64 { return l.median(c, "", rateOf) })
	const name = "throughput-by-concurrency"
	if len(values) == 0 {
		return nil, name, nil
	}
	c := newCanvas("Throughput by concurrency: 1 KiB, one message a request", "clients", "messages/s")
	return c, name, r.scatter(c, all, values, ticks, short, r.diskLimit()/1024)
}

// byPayload is throughput over the size of a message.
func (r *results) byPayload() (*canvas, string, error) {
	places, ticks := map[string]float64{}, map[float64]string{}
	for _, l := range r.Lines {
		if strings.HasPrefix(l.Name, "size-") || l.Name == "clients-64" {
			places[l.Name], ticks[float64(l.W.Size)] = float64(l.W.Size), bench.FormatBytes(int64(l.W.Size))
		}
	}
	all, values := r.collect(places, func(l *lineResult, c contender) float64 {
		return l.median(c, "", func(m *measurement) (float64, bool) { return m.BytesPerSecond, m.BytesPerSecond > 0 })
	})
	const name = "throughput-by-payload"
	if len(values) == 0 {
		return nil, name, nil
	}
	c := newCanvas("Throughput by payload: 64 clients, one message a request", "size of a message", "bytes of bodies a second")
	return c, name, r.scatter(c, all, values, ticks, shortBytes, r.diskLimit())
}

// scatter draws series over logarithmic axes with the limit of the disk.
func (r *results) scatter(c *canvas, all []series, values []float64, ticks map[float64]string, unit func(float64) string, limit float64) error {
	var xs []float64
	for x := range ticks {
		xs = append(xs, x)
	}
	if limit > 0 {
		values = append(values, limit)
		if err := c.limit(limit, slices.Min(xs)/1.5, slices.Max(xs)*1.5, "disk, three streams"); err != nil {
			return err
		}
	}
	for _, s := range all {
		if err := c.add(s); err != nil {
			return err
		}
	}
	logarithmic(&c.X, named(ticks))
	logarithmic(&c.Y, countTicks{unit})
	fit(&c.X, xs)
	fit(&c.Y, values)
	c.legendBelow(len(all) + 1)
	return nil
}

// legendBelow gives the legend a place right of the data.
func (c *canvas) legendBelow(entries int) {
	// The data ends before the legend begins: the axis goes on without ticks.
	if c.X.Scale != nil && entries > 0 {
		if _, ok := c.X.Scale.(plot.LogScale); ok {
			c.X.Max *= math.Pow(c.X.Max/c.X.Min, 0.42)
			return
		}
	}
	c.X.Max += 0.42 * (c.X.Max - c.X.Min)
}

// percentiles are the latencies of a line.
func (r *results) percentiles(line string, endToEnd bool) (*canvas, string, error) {
	what := "publish"
	if endToEnd {
		what = "end to end"
	}
	name := "latency-" + line
	l, ok := r.line(line)
	if !ok {
		return nil, name, nil
	}
	c := newCanvas(fmt.Sprintf("Latency, %s: %s", what, l.Title), "percentile", "ms")
	ticks := map[float64]string{0: "50", 1: "90", 2: "99", 3: "99.9", 4: "max"}
	var values []float64
	drawn := 0
	for _, who := range l.contendersOf() {
		of := func(q func(bench.Percentiles) int64) float64 {
			return l.median(who, "", func(m *measurement) (float64, bool) {
				p := m.Publish
				if endToEnd {
					if m.EndToEnd == nil {
						return 0, false
					}
					p = *m.EndToEnd
				}
				return float64(q(p)) / 1000, p.Count > 0
			})
		}
		var points plotter.XYs
		for i, q := range []func(bench.Percentiles) int64{
			p50, func(p bench.Percentiles) int64 { return p.P90 }, p99,
			func(p bench.Percentiles) int64 { return p.P999 }, func(p bench.Percentiles) int64 { return p.Max },
		} {
			if v := of(q); v > 0 {
				points = append(points, plotter.XY{X: float64(i), Y: v})
				values = append(values, v)
			}
		}
		if len(points) == 0 {
			continue
		}
		drawn++
		if err := c.add(series{who.String(), points}); err != nil {
			return nil, name, err
		}
	}
	if drawn == 0 {
		return nil, name, nil
	}
	if p, ok := l.probe(1); ok && p.Sync.P50 > 0 {
		values = append(values, float64(p.Sync.P50)/1000)
		if err := c.limit(float64(p.Sync.P50)/1000, 0, 4, "one sync of 4 KiB, p50"); err != nil {
			return nil, name, err
		}
	}
	c.X.Tick.Marker, c.X.Min, c.X.Max = named(ticks), -0.2, 4.2
	logarithmic(&c.Y, countTicks{short})
	fit(&c.Y, values)
	c.legendBelow(drawn)
	return c, name, nil
}

// bars are the throughputs of the other shapes of load.
func (r *results) bars() (*canvas, string, error) {
	const name = "throughput-by-shape"
	shapes := []struct{ line, label string }{{"batch", "batches of 100"}, {"window", "windows of 64"}, {"roundtrip", "round trip"}, {"fanout-3", "fan-out to 3"}, {"mixed", "mixed sizes"}, {"topics-64", "64 topics"}}
	var lines []*lineResult
	ticks := map[float64]string{}
	for _, s := range shapes {
		if l, ok := r.line(s.line); ok && len(l.contendersOf()) > 0 {
			ticks[float64(len(lines))] = s.label
			lines = append(lines, l)
		}
	}
	if len(lines) == 0 {
		return nil, name, nil
	}
	c := newCanvas("Throughput by shape of the load: 1 KiB", "", "messages/s")
	var values []float64
	var order []contender
	for _, l := range lines {
		for _, who := range l.contendersOf() {
			if !slices.Contains(order, who) {
				order = append(order, who)
			}
		}
	}
	for i, who := range order {
		// Bars on a logarithmic axis would have no meaningful foot: points with the range of the rounds instead.
		var points plotter.XYs
		for x, l := range lines {
			s := spreadOf(l.values(who, "", rateOf))
			if s.n == 0 {
				continue
			}
			at := float64(x) + 0.09*(float64(i)-float64(len(order)-1)/2)
			points = append(points, plotter.XY{X: at, Y: s.median})
			values = append(values, s.min, s.max)
			span, err := plotter.NewLine(plotter.XYs{{X: at, Y: s.min}, {X: at, Y: s.max}})
			if err != nil {
				return nil, name, err
			}
			span.Color, span.Width = looks[who.String()].c, vg.Points(1.2)
			c.Add(span)
		}
		scatter, err := plotter.NewScatter(points)
		if err != nil {
			return nil, name, err
		}
		look := looks[who.String()]
		scatter.Color, scatter.Shape, scatter.Radius = look.c, look.glyph, vg.Points(3.5)
		c.Add(scatter)
		c.Legend.Add(who.String(), scatter)
	}
	if limit := r.diskLimit() / 1024; limit > 0 {
		values = append(values, limit)
		if err := c.limit(limit, -0.5, float64(len(lines))-0.5, "disk, three streams"); err != nil {
			return nil, name, err
		}
	}
	c.X.Min, c.X.Max, c.X.Tick.Marker = -0.5, float64(len(lines))-0.5, named(ticks)
	c.X.Tick.Label.Font.Size = vg.Points(8)
	logarithmic(&c.Y, countTicks{short})
	fit(&c.Y, values)
	c.legendBelow(len(order))
	return c, name, nil
}

// timeline is the acknowledgements a second through a kill of the leader.
func (r *results) timeline() (*canvas, string, error) {
	const name = "leader-kill"
	if r.Kill == nil || len(r.Kill.Timeline) == 0 {
		return nil, name, nil
	}
	k := r.Kill
	c := newCanvas(fmt.Sprintf("The leader is killed under load: %d publishers over HTTP on all three servers", k.Workload.Publishers), "seconds", "acknowledged a second")
	var ok, failed plotter.XYs
	most := 0.0
	for i, step := range k.Timeline {
		at := (time.Duration(i) * bench.TimelineEvery).Seconds()
		rate := float64(step.Acknowledged) / bench.TimelineEvery.Seconds()
		ok = append(ok, plotter.XY{X: at, Y: rate})
		most = max(most, rate)
		if step.Failed > 0 {
			failed = append(failed, plotter.XY{X: at, Y: float64(step.Failed) / bench.TimelineEvery.Seconds()})
		}
	}
	line, err := plotter.NewLine(ok)
	if err != nil {
		return nil, name, err
	}
	line.Color, line.Width = looks["tercet/resp"].c, vg.Points(1.4)
	c.Add(line)
	c.Legend.Add("acknowledged", line)
	if len(failed) > 0 {
		points, err := plotter.NewScatter(failed)
		if err != nil {
			return nil, name, err
		}
		points.Color, points.Shape = looks["redis"].c, draw.CrossGlyph{}
		c.Add(points)
		c.Legend.Add("failed or unknown", points)
	}
	at := k.DisruptedAt.Seconds()
	kill, err := plotter.NewLine(plotter.XYs{{X: at, Y: 0}, {X: at, Y: most * 1.1}})
	if err != nil {
		return nil, name, err
	}
	kill.Color, kill.Dashes = looks["redis"].c, dashed
	c.Add(kill)
	c.Legend.Add("SIGKILL", kill)
	c.Y.Min, c.Y.Max = 0, most*1.35
	return c, name, nil
}
